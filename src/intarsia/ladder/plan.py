"""A comparison as it is asked for: arms, budget, data, seeds, learning rates, evaluation and figures.

Everything that is not an arm is shared by all arms. A plan is checked as a whole before anything runs; `plan_tables.py`
has its parts, `plan_file.py` reads it from files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from intarsia.data import CorpusOptions
from intarsia.errors import OptionError, did_you_mean
from intarsia.ladder.plan_tables import (
    BUDGET_UNITS,
    Arm,
    Budget,
    EvaluationOptions,
    ExamOptions,
    Figures,
    Matching,
    PlanError,
    Tuning,
)
from intarsia.settings import check_bounds, merge, read, settle_types, with_none, without_none

#: Options of training that the comparison sets itself, and where a plan says them.
_OWNED = {
    "steps": "[budget]",
    "lr": "[tuning] learning_rates",
    "seed": "seeds",
    "data_seed": "seeds",
}

_OPEN_TABLES = ("model", "training", "quick", "full")
"""In which any name may stand, and `"null"` for None."""


@dataclass(frozen=True)
class Plan:
    """A comparison, ready to be run by `intarsia.ladder.compare`."""

    arms: tuple[Arm, ...]
    tuning: Tuning
    seeds: tuple[int, ...]
    budget: Budget | None = None
    """What a run on text may spend. None: nothing is judged by text, and there are exams alone."""
    examined_on: tuple[ExamOptions, ...] = ()
    """Tasks that every arm learns from scratch and is examined on, each by runs of its own."""
    name: str = "comparison"
    title: str = ""
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model configuration of every arm, before the arm's own. Those under `mixers` are for the
    arms that have the mixer."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of `intarsia.training.TrainConfig`, shared by all runs. `eval_every` with `eval_documents` or
    `eval_bytes` adds held-out curves to the report; the verdict has documents of its own."""
    processes: int = 1
    """Processes that train each model on text together, its parameters divided among them (FSDP2): on machines with
    GPUs each takes one. What is learned for exams is small and learned in one."""
    matching: Matching = field(default_factory=Matching)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    figures: Figures = field(default_factory=Figures)
    baselines: Literal["ngram", "none"] = "ngram"
    """Reference rows: unigram and bigram models of the same tokens."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Changes to this plan that make it a matter of seconds, for `--quick`."""
    full: Mapping[str, Any] = field(default_factory=dict)
    """Changes to this plan that give it the size at which its question was asked, for `--full`."""

    def __post_init__(self) -> None:
        settle_types(self)
        for table in _OPEN_TABLES:
            object.__setattr__(self, table, with_none(getattr(self, table)))
        names = [arm.name for arm in self.arms]
        if not self.arms or (self.budget is not None and len(self.arms) < 2):
            raise PlanError(f"a comparison needs at least two arms, got {len(self.arms)}", ("arms",))
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlanError(f"two arms are called {name!r}", ("arms", index, "name"))
        if not self.seeds:
            raise PlanError(
                "at least one seed is needed; three or more make a verdict worth having", ("seeds",)
            )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise PlanError(f"must be different and not negative; got {list(self.seeds)}", ("seeds",))
        if self.tuning.seed in self.seeds:
            raise PlanError(
                f"seed {self.tuning.seed} chooses the learning rates and is among the judged seeds: the chosen "
                "rate would be judged on the luck that chose it; take another",
                ("tuning", "seed"),
            )
        if self.budget is None and not self.examined_on:
            raise PlanError(
                "is missing: say what a run on text may spend, or name tasks in [[examined_on]]", ("budget",)
            )
        exams = [exam.name for exam in self.examined_on]
        for index, name in enumerate(exams):
            if name in exams[:index]:
                raise PlanError(
                    f"two exams are called {name!r}: give one a name", ("examined_on", index, "name")
                )
        reference = self.matching.reference
        if reference is not None and reference not in names:
            raise PlanError(
                f"no arm {reference!r}{did_you_mean(reference, names)}", ("matching", "reference")
            )
        self._check_presets()
        self._check_training(self.training, ("training",), _OWNED)
        self._check_processes()
        for index, exam in enumerate(self.examined_on):
            place = ("examined_on", index, "training")
            owned = {**_OWNED, "steps": "steps", "rows": "rows", "length": "options.length"}
            self._check_training(exam.training, place, owned)

    def _check_presets(self) -> None:
        from intarsia.model import presets

        for index, arm in enumerate(self.arms):
            if arm.preset is not None and arm.preset not in presets.names():
                near = did_you_mean(arm.preset, presets.names())
                raise PlanError(f"there is no preset {arm.preset!r}{near}", ("arms", index, "preset"))

    def _check_training(
        self, training: Mapping[str, Any], place: tuple[str | int, ...], owned: Mapping[str, str]
    ) -> None:
        from intarsia.training.config import TrainConfig

        for key in training:
            if key in owned:
                raise PlanError(f"is set by the comparison; say it in {owned[key]}", (*place, key))
        try:
            # A year of steps, so that only the options themselves are checked here.
            TrainConfig.from_dict({"steps": 10**9, **training})
        except OptionError as error:
            raise PlanError(error.message, (*place, *error.path)) from None

    def _check_processes(self) -> None:
        from intarsia.training.config import TrainConfig

        check_bounds(self, "processes", least=1)
        rows = TrainConfig.from_dict({"steps": 10**9, **self.training}).rows
        if rows % self.processes:
            raise PlanError(
                f"{self.processes} processes share the rows of a step, and {rows} cannot be divided among them: "
                "change [training] rows",
                ("processes",),
            )
        if self.processes > 1 and self.budget is not None and self.budget.seconds is not None:
            raise PlanError(
                "a budget of seconds is timed in one process: give tokens, steps or FLOPs", ("processes",)
            )

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def rates(self, arm: Arm, exam: ExamOptions | None = None) -> tuple[float, ...]:
        """The learning rates that are tried for an arm, on text or for an exam."""
        return (exam and exam.learning_rates) or arm.learning_rates or self.tuning.learning_rates

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; `Plan.from_dict` takes them back."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        for owner in (values, *values["arms"], *values["examined_on"]):
            for table in owner.keys() & set(_OPEN_TABLES):
                # What None means there is not this class's to know, so it must not be lost.
                owner[table] = without_none(owner[table])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that the values describe.

        Raises:
            PlanError: anything that is wrong, with the place where.
        """
        try:
            return read(cls, values)
        except OptionError as error:
            raise PlanError(error.message, error.path) from None

    def as_quick(self) -> Plan:
        """The plan with its `quick` changes, or with a general shortening where it has none.

        The shortening: two seeds, the middle learning rate of each grid, twenty steps, twenty documents of at most
        512 tokens, two contexts. Exams are shortened too, unless the changes have some. It shows that everything works
        and judges nothing.
        """
        values = self.to_dict()
        changes = self.quick
        if not changes:
            rates = sorted(self.tuning.learning_rates)
            changes = {
                "seeds": list(self.seeds[:2]),
                "budget": {**dict.fromkeys(BUDGET_UNITS), "steps": 20} if self.budget else None,
                "training": {"warmup_steps": 2},
                "tuning": {"learning_rates": [rates[len(rates) // 2]], "documents": 5},
                "evaluation": {"documents": 20, "tokens_per_document": 512},
                "figures": {"contexts": list(self.figures.contexts[:2]), "repeats": 2, "throughput_steps": 1},
                "arms": [{**arm, "learning_rates": None} for arm in values["arms"]],
            }
        if self.examined_on and "examined_on" not in changes:
            changes = {**changes, "examined_on": [_short(exam) for exam in values["examined_on"]]}
        return self._with(changes, "quick")

    def as_full(self) -> Plan:
        """The plan with its `full` changes.

        Raises:
            PlanError: it has none.
        """
        if not self.full:
            raise PlanError("is missing: the plan has no other size than its own", ("full",))
        return self._with(self.full, "full")

    def _with(self, changes: Mapping[str, Any], size: Literal["quick", "full"]) -> Plan:
        values = {name: value for name, value in self.to_dict().items() if name not in ("quick", "full")}
        budget = changes.get("budget", {})
        if isinstance(budget, Mapping) and len(budget) == 1:
            # A budget in the other unit replaces the plan's, and does not stand beside it.
            changes = {**changes, "budget": {**dict.fromkeys(BUDGET_UNITS), **budget}}
        try:
            changed = Plan.from_dict(merge(values, changes))
        except PlanError as error:
            raise error.under((size,)) from None
        return dataclasses.replace(changed, name=f"{self.name}-{size}")


def _short(exam: Mapping[str, Any]) -> dict[str, Any]:
    """An exam as a matter of seconds."""
    most = {"steps": 20, "examples": 32}
    return {**exam, **{name: min(exam[name], limit) for name, limit in most.items()}, "learning_rates": None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
