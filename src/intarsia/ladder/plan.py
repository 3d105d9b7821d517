"""What a comparison is: arms, budget, data, seeds, learning rates, evaluation and figures.

A plan is a TOML file, or a Python file that defines `plan = Plan(...)`. Everything that is not an arm is shared
by all arms. The plan is checked as a whole before anything runs; `docs/comparison.md` explains each option.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.ladder.schema import PlanError, build, merge, toml_line, with_none, without_none

#: Options of training that the comparison sets itself, and where a plan says them.
_OWNED = {
    "steps": "[budget]",
    "lr": "[tuning] learning_rates",
    "seed": "seeds",
    "data_seed": "seeds",
}


FEWEST_JUDGED = 10
"""The fewest documents to judge by. Where documents differ more than seeds do, an interval that says 95 % misses the
truth in about 12 % of all cases with 10 documents, 17 % with 5 and 48 % with 2."""


@dataclass(frozen=True)
class Arm:
    """One architecture: a preset with changes, or a whole model configuration."""

    name: str
    preset: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the preset's configuration, table by table; without a preset the whole configuration."""
    note: str = ""
    """A line of description for the table and the report."""
    learning_rates: tuple[float, ...] | None = None
    """The grid of this arm, where it should differ from the plan's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", with_none(self.model))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise PlanError(
                f"{self.name!r} must be letters, digits, '.', '_' and '-': it names directories", ("name",)
            )
        if self.preset is None and not self.model:
            raise PlanError(
                f"the arm {self.name!r} needs a preset, or a [arms.model] table with a whole configuration"
            )
        if self.learning_rates is not None:
            _check_rates(self.learning_rates, ("learning_rates",))


@dataclass(frozen=True)
class Corpus:
    """The text and how it becomes tokens, as `intarsia.data` opens them."""

    source: str = "python"
    tokenizer: str = "bpe:4096"
    limit_bytes: int | None = None
    text_field: str = "text"
    heldout: float = 0.05
    """The share of documents that is kept from training, for tuning and judging."""

    def __post_init__(self) -> None:
        if self.limit_bytes is not None:
            _check_least(self, "limit_bytes", 1)
        if not 0 < self.heldout < 1:
            raise PlanError(f"must be above 0 and below 1, got {self.heldout}", ("heldout",))


@dataclass(frozen=True)
class Budget:
    """What each run may spend: tokens or optimizer steps, one of the two."""

    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.steps is None):
            raise PlanError("give either tokens or steps, and not both")
        _check_least(self, "tokens" if self.steps is None else "steps", 1)

    def steps_of(self, tokens_per_step: int) -> int:
        """Optimizer steps that spend the budget; tokens are rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // tokens_per_step)


@dataclass(frozen=True)
class Tuning:
    """How each arm's learning rate is chosen, before and apart from what is judged.

    With more than one rate, one run per rate is trained with `seed`, which may not be one of the judged
    seeds, and scored on `documents` held-out documents, none of which is judged. The lowest bits per byte wins.
    With one rate there is nothing to choose and no such run.
    """

    learning_rates: tuple[float, ...]
    seed: int = 0
    documents: int = 100
    budget_share: float = 1.0
    """The share of the budget that a tuning run spends. Below 1 is cheaper, and the best rate of a shorter run is
    not quite that of the whole; the same for all arms."""

    def __post_init__(self) -> None:
        _check_rates(self.learning_rates, ("learning_rates",))
        if not 0 < self.budget_share <= 1:
            raise PlanError(f"must be above 0 and at most 1, got {self.budget_share}", ("budget_share",))
        _check_least(self, "seed", 0)
        _check_least(self, "documents", 1)


@dataclass(frozen=True)
class Matching:
    """How parameters (without embeddings and head) are brought together."""

    reference: str | None = None
    """The arm whose parameter count the others are matched to; the first by default."""
    tolerance: float = 0.01
    """The largest relative difference that is allowed, after matching."""
    adjust: bool = True
    """Change the feed-forward width of each other arm to come nearest. False: only check."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise PlanError(f"must be at least 0 and below 1, got {self.tolerance}", ("tolerance",))


@dataclass(frozen=True)
class Evaluation:
    """What is judged, and how sure the verdict must be."""

    documents: int = 400
    """Held-out documents that are judged, at least `FEWEST_JUDGED`. All of them, with a warning, where fewer."""
    tokens_per_document: int | None = None
    """Judge so many tokens from the start of each document. None: whole documents."""
    confidence: float = 0.95
    """Nominal confidence of the intervals."""
    margin: float | None = None
    """Bits per byte: arms closer than this are called equal, if the interval says so."""
    resamples: int = 20_000
    seed: int = 0
    """Of the choice of documents and of the bootstrap."""

    def __post_init__(self) -> None:
        _check_least(self, "documents", FEWEST_JUDGED)
        _check_least(self, "resamples", 1000)
        _check_least(self, "seed", 0)
        if self.tokens_per_document is not None:
            _check_least(self, "tokens_per_document", 1)
        if not 0.5 <= self.confidence < 1:
            raise PlanError(f"must be at least 0.5 and below 1, got {self.confidence}", ("confidence",))
        if self.margin is not None and self.margin <= 0:
            raise PlanError(f"must be above 0, got {self.margin}", ("margin",))


@dataclass(frozen=True)
class Figures:
    """What is measured and shown beside the verdict."""

    contexts: tuple[int, ...] = (256, 1024, 4096)
    """Tokens already read when decoding is timed and the cache is weighed."""
    decode_tokens: int = 16
    """Tokens decoded for one timing."""
    repeats: int = 5
    """Timings of each figure, the arms in turn; the median is shown."""
    throughput_steps: int = 5
    """Training steps timed for each arm, the arms in turn; 0 leaves the figure out."""
    prompts: tuple[str, ...] = ()
    """Texts for the models to continue. Empty: they begin a new document."""
    sample_tokens: int = 120
    """Tokens of each sample; 0 leaves samples out."""
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if any(context < 1 for context in self.contexts) or list(self.contexts) != sorted(set(self.contexts)):
            raise PlanError(f"must be positive and growing, got {list(self.contexts)}", ("contexts",))
        for name, least in (
            ("decode_tokens", 1),
            ("repeats", 1),
            ("throughput_steps", 0),
            ("sample_tokens", 0),
        ):
            _check_least(self, name, least)


@dataclass(frozen=True)
class Plan:
    """A comparison, ready to be run by `intarsia.ladder.compare`."""

    arms: tuple[Arm, ...]
    budget: Budget
    tuning: Tuning
    seeds: tuple[int, ...]
    name: str = "comparison"
    title: str = ""
    corpus: Corpus = field(default_factory=Corpus)
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model configuration of every arm, before the arm's own. Those under `mixers` are for the
    arms that have the mixer."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of `intarsia.training.TrainConfig`, shared by all runs. `eval_every` with `eval_documents` or
    `eval_bytes` adds held-out curves to the report; the verdict has documents of its own."""
    matching: Matching = field(default_factory=Matching)
    evaluation: Evaluation = field(default_factory=Evaluation)
    figures: Figures = field(default_factory=Figures)
    baselines: Literal["ngram", "none"] = "ngram"
    """Reference rows: unigram and bigram models of the same tokens."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Changes to this plan that make it a matter of seconds, for `--quick`."""

    def __post_init__(self) -> None:
        for table in ("model", "training", "quick"):
            object.__setattr__(self, table, with_none(getattr(self, table)))
        names = [arm.name for arm in self.arms]
        if len(self.arms) < 2:
            raise PlanError(f"a comparison needs at least two arms, got {len(self.arms)}", ("arms",))
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlanError(f"two arms are called {name!r}", ("arms", index, "name"))
        if not self.seeds:
            raise PlanError(
                "at least one seed is needed; three or more make a verdict worth having", ("seeds",)
            )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise PlanError(f"must be different and not negative, got {list(self.seeds)}", ("seeds",))
        if self.tuning.seed in self.seeds:
            raise PlanError(
                f"seed {self.tuning.seed} chooses the learning rates and is among the judged seeds: the chosen "
                "rate would be judged on the luck that chose it; take another",
                ("tuning", "seed"),
            )
        reference = self.matching.reference
        if reference is not None and reference not in names:
            raise PlanError(
                f"no arm {reference!r}{did_you_mean(reference, names)}", ("matching", "reference")
            )
        self._check_presets()
        self._check_training()

    def _check_presets(self) -> None:
        from intarsia.model import presets

        for index, arm in enumerate(self.arms):
            if arm.preset is not None and arm.preset not in presets.names():
                near = did_you_mean(arm.preset, presets.names())
                raise PlanError(f"there is no preset {arm.preset!r}{near}", ("arms", index, "preset"))

    def _check_training(self) -> None:
        from intarsia.training.config import TrainConfig

        known = [option.name for option in dataclasses.fields(TrainConfig)]
        for key in self.training:
            if key in _OWNED:
                raise PlanError(
                    f"the comparison sets this itself; say it in {_OWNED[key]}", ("training", key)
                )
            if key not in known:
                free = [name for name in known if name not in _OWNED]
                raise PlanError(f"unknown option{did_you_mean(key, free)}", ("training", key))
        try:
            # A year of steps, so that only the options themselves are checked here.
            TrainConfig.from_dict({"steps": 10**9, **self.training})
        except (ConfigError, TypeError) as error:
            path = error.path if isinstance(error, OptionError) else ()
            raise PlanError(str(error), ("training", *path)) from None

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """The learning rates that are tried for an arm."""
        return arm.learning_rates or self.tuning.learning_rates

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; `Plan.from_dict` takes them back."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        for owner in (values, *values["arms"]):
            for table in owner.keys() & {"model", "training", "quick"}:
                # What None means there is not this class's to know, so it must not be lost.
                owner[table] = without_none(owner[table])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that the values describe.

        Raises:
            PlanError: anything that is wrong, with the place where.
        """
        return build(cls, values)

    def as_quick(self) -> Plan:
        """The plan with its `quick` changes, or with a general shortening where it has none.

        The shortening: two seeds, the middle learning rate of each grid, twenty steps, twenty documents of at most
        512 tokens, two contexts. It shows that everything works and judges nothing.
        """
        values = self.to_dict()
        changes: Mapping[str, Any] = values.pop("quick")
        if not changes:
            rates = sorted(self.tuning.learning_rates)
            changes = {
                "seeds": list(self.seeds[:2]),
                "budget": {"tokens": None, "steps": 20},
                "training": {"warmup_steps": 2},
                "tuning": {"learning_rates": [rates[len(rates) // 2]], "documents": 5},
                "evaluation": {"documents": 20, "tokens_per_document": 512},
                "figures": {"contexts": list(self.figures.contexts[:2]), "repeats": 2, "throughput_steps": 1},
                "arms": [{**arm, "learning_rates": None} for arm in values["arms"]],
            }
        budget = changes.get("budget", {})
        if isinstance(budget, Mapping) and len(budget) == 1:
            # A budget in the other unit replaces the plan's, and does not stand beside it.
            other = "tokens" if "steps" in budget else "steps"
            changes = {**changes, "budget": {**budget, other: None}}
        try:
            quick = Plan.from_dict(merge(values, changes))
        except PlanError as error:
            raise error.under(("quick",)) from None
        return dataclasses.replace(quick, name=f"{self.name}-quick")


def load_plan(path: str | Path, *, quick: bool = False) -> Plan:
    """Read a plan from a `.toml` or a `.py` file. A plan without a name takes the file's.

    Raises:
        PlanError: the file is missing, cannot be read, or says something wrong; with the line for TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(
            f"there is no plan file {path}; examples/demo.toml in the repository is one to start from"
        )
    if path.suffix == ".toml":
        plan = _load_toml(path)
    elif path.suffix == ".py":
        plan = _load_python(path)
    else:
        raise PlanError(f"{path}: a plan is a .toml or a .py file")
    if plan.name == "comparison":
        plan = dataclasses.replace(plan, name=path.stem)
    return plan.as_quick() if quick else plan


def _load_toml(path: Path) -> Plan:
    import tomllib

    from intarsia.ladder.arms import check_models

    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not TOML: {error}") from None
    try:
        plan = Plan.from_dict(values)
        check_models(plan)
        check_models(plan.as_quick())
    except PlanError as error:
        line = toml_line(text, error.path)
        raise _located(error, f"{path}:{line}" if line else str(path)) from None
    return plan


def _load_python(path: Path) -> Plan:
    try:
        names = runpy.run_path(str(path))
    except ConfigError as error:
        raise PlanError(f"{path}: {error}") from None
    except Exception as error:
        raise PlanError(f"{path} failed with {type(error).__name__}: {error}") from error
    plan = names.get("plan")
    if not isinstance(plan, Plan):
        raise PlanError(f"{path} must define `plan = intarsia.ladder.Plan(...)`")
    return plan


def _located(error: PlanError, place: str) -> PlanError:
    located = PlanError(f"{place}: {error}")
    located.path = error.path
    return located


def _check_least(owner: object, name: str, least: int) -> None:
    value = getattr(owner, name)
    if value < least:
        raise PlanError(f"must be at least {least}, got {value}", (name,))


def _check_rates(rates: tuple[float, ...], path: tuple[str | int, ...]) -> None:
    if not rates:
        raise PlanError("at least one learning rate is needed", path)
    if len(set(rates)) < len(rates) or min(rates) <= 0:
        raise PlanError(f"must be different and above 0, got {list(rates)}", path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


__all__ = [
    "Arm",
    "Budget",
    "Corpus",
    "Evaluation",
    "Figures",
    "Matching",
    "Plan",
    "PlanError",
    "Tuning",
    "load_plan",
]
