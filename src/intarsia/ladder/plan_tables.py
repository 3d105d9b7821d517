"""The tables of a plan: arms, budget, tuning, matching, evaluation, figures, exams. `docs/comparison.md`
explains each option."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from intarsia.errors import ConfigError, OptionError
from intarsia.settings import check_bounds, settle_types, with_none

if TYPE_CHECKING:
    from intarsia.tasks import Task

FEWEST_JUDGED = 10
"""The fewest documents to judge by. Where documents differ more than seeds do, an interval that says 95 % misses the
truth in about 12 % of all cases with 10 documents, 17 % with 5 and 48 % with 2."""


class PlanError(OptionError):
    """A plan that cannot be right."""


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
        settle_types(self)
        object.__setattr__(self, "model", with_none(self.model))
        check_name(self.name)
        if self.preset is None and not self.model:
            raise PlanError(
                f"the arm {self.name!r} needs a preset, or a [arms.model] table with a whole configuration"
            )
        if self.learning_rates is not None:
            check_rates(self.learning_rates, ("learning_rates",))


@dataclass(frozen=True)
class Budget:
    """What each run may spend: tokens, optimizer steps, FLOPs of training, or seconds of it; one of the four.

    With tokens and steps all arms read the same. With FLOPs, by each model's own count (`ModelCost`), and with seconds
    a cheaper arm reads more: the same batches as far as another one comes, and further ones.
    """

    tokens: int | None = None
    steps: int | None = None
    flops: float | None = None
    seconds: float | None = None
    """At the speed with which each arm trains on this machine. It is timed once before anything is trained, and kept
    (`intarsia.ladder.speeds`); from then on the number of steps is fixed."""

    def __post_init__(self) -> None:
        settle_types(self)
        given = [unit for unit in BUDGET_UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            names = f"{', '.join(BUDGET_UNITS[:-1])} or {BUDGET_UNITS[-1]}"
            raise PlanError(f"give one of {names}, and not {' and '.join(given) or 'none'}")
        check_bounds(self, "tokens", "steps", least=1)
        check_bounds(self, "flops", "seconds", above=0)

    @property
    def unit(self) -> str:
        """Which of the four was given."""
        return next(unit for unit in BUDGET_UNITS if getattr(self, unit) is not None)

    def steps_of(
        self, tokens_per_step: int, *, flops_per_token: float = 0.0, tokens_per_second: float = 0.0
    ) -> int:
        """Optimizer steps that spend the budget. Tokens are rounded up to whole steps; FLOPs and seconds down, since
        they are what may be spent.

        Args:
            flops_per_token: of training, for a budget of FLOPs.
            tokens_per_second: of training, for a budget of seconds.

        Raises:
            PlanError: it does not pay for one step.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        if self.flops is not None:
            steps, needed = self.flops / flops_per_token / tokens_per_step, flops_per_token * tokens_per_step
            said = f"{self.flops:.3g} FLOPs, and a step takes {needed:.3g}"
        else:
            assert self.seconds is not None
            steps = self.seconds * tokens_per_second / tokens_per_step
            needed = tokens_per_step / tokens_per_second
            said = f"{self.seconds:.3g} seconds, and a step takes {needed:.3g}"
        if steps < 1:
            raise PlanError(
                f"allows no step: it is {said}; give more, or smaller steps ([training] rows, length)"
            )
        return int(steps)


BUDGET_UNITS = ("tokens", "steps", "flops", "seconds")


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
    beyond: int = 2
    """So many rates beyond the grid are tried at most, one after the other, while the best is at an end of what was
    tried. A rate that is still at an end weakens the verdict."""
    budget_share: float = 1.0
    """The share of the budget that a tuning run spends. Below 1 is cheaper, and the best rate of a shorter run is
    not quite that of the whole; the same for all arms."""

    def __post_init__(self) -> None:
        settle_types(self)
        check_rates(self.learning_rates, ("learning_rates",))
        check_bounds(self, "budget_share", above=0, most=1)
        check_bounds(self, "seed", "beyond", least=0)
        check_bounds(self, "documents", least=1)


@dataclass(frozen=True)
class Matching:
    """How parameters (without embeddings and head) are brought together, and the bytes of states where asked for."""

    reference: str | None = None
    """The arm whose parameter count the others are matched to; the first by default."""
    tolerance: float = 0.01
    """The largest relative difference that is allowed, after matching."""
    of: Literal["both", "total", "active"] = "both"
    """Which parameters are matched: all, those that compute one token (experts that idle do not), or both."""
    adjust: bool = True
    """Change the feed-forward width of each other arm to come nearest. False: only check."""
    state_at: int | None = None
    """Match the bytes of states after so many tokens too: the windows of arms with sliding windows are chosen for it,
    and arms without must have as many as they are. None: states are shown and not matched."""
    state_tolerance: float = 0.05

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "tolerance", "state_tolerance", least=0, below=1)
        check_bounds(self, "state_at", least=1)


@dataclass(frozen=True)
class EvaluationOptions:
    """What is judged, and how sure the verdict must be."""

    documents: int = 400
    """Held-out documents that are judged, at least `FEWEST_JUDGED`. All of them, with a warning, where fewer."""
    tokens_per_document: int | None = None
    """Judge so many tokens from the start of each document. None: whole documents."""
    confidence: float = 0.95
    """Nominal confidence of the intervals."""
    margin: float | None = None
    """Bits per byte: arms closer than this are called equal, if the interval says so."""
    sequential: bool = False
    """The verdict may be looked at while seeds are still added: each look spends a part of the allowed errors
    (`intarsia.ladder.history`), in the same directory."""
    resamples: int = 20_000
    seed: int = 0
    """Of the choice of documents and of the bootstrap."""

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "documents", least=FEWEST_JUDGED)
        check_bounds(self, "resamples", least=1000)
        check_bounds(self, "seed", least=0)
        check_bounds(self, "tokens_per_document", least=1)
        check_bounds(self, "confidence", least=0.5, below=1)
        check_bounds(self, "margin", above=0)


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
        settle_types(self)
        if any(context < 1 for context in self.contexts) or list(self.contexts) != sorted(set(self.contexts)):
            raise PlanError(f"must be positive and growing; got {list(self.contexts)}", ("contexts",))
        check_bounds(self, "decode_tokens", "repeats", least=1)
        check_bounds(self, "throughput_steps", "sample_tokens", least=0)


@dataclass(frozen=True)
class ExamOptions:
    """A task (`intarsia.tasks`) that every arm learns from scratch and is examined on.

    As with text, each arm's learning rate is chosen by runs with the plan's tuning seed, here by the answers to
    validation examples; what is reported are test examples, of runs with the plan's seeds. A run ends when no
    validation example has a mistake, or with its steps.
    """

    task: str
    options: Mapping[str, Any]
    """Of the task, `length` among them."""
    name: str = ""
    """In tables and directories; the task with its length by default."""
    steps: int = 2000
    rows: int = 16
    """Examples of a step."""
    learning_rates: tuple[float, ...] | None = None
    """The grid for all arms; by default each arm's own of the plan."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of TrainConfig, where they should differ from `EXAM_TRAINING`."""
    examples: int = 256
    """Of the validation, and of the test."""
    examine_every: int = 50
    """Steps between two validations."""
    dials: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of some of the task's options: the judged models are examined under every combination of them, too, which
    they have not been trained on unless the task mixes them."""
    mixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of some of the task's options, of which every combination comes in turn in training, in the validation and
    in the test (`intarsia.tasks.mixed`)."""

    def __post_init__(self) -> None:
        from intarsia.tasks import make_task

        settle_types(self)
        object.__setattr__(self, "options", with_none(self.options))
        object.__setattr__(self, "training", with_none(self.training))
        check_bounds(self, "steps", "rows", "examples", "examine_every", least=1)
        if self.learning_rates is not None:
            check_rates(self.learning_rates, ("learning_rates",))
        make_task(self.task, self.options)  # before what is mixed: what is wrong is wrong without
        self._check_values("mixed", None)
        task = self.made
        if not self.name:
            object.__setattr__(self, "name", f"{self.task}-{task.length}")
        check_name(self.name)
        self._check_values("dials", task)

    @property
    def made(self) -> Task:
        """What is learned."""
        from intarsia.tasks.registry import make_mixed

        try:
            return make_mixed(self.task, self.options, self.mixture)
        except OptionError:
            raise
        except ConfigError as error:
            raise PlanError(str(error), ("mixed",)) from None

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """Every combination of what is mixed; none where nothing is."""
        from intarsia.tasks.mixed import combinations

        return combinations(self.mixed)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Every combination of the dials' values; none where there are no dials."""
        from intarsia.tasks.mixed import combinations

        return combinations(self.dials)

    def _check_values(self, table: Literal["dials", "mixed"], learned: Task | None) -> None:
        """Settle a table of values of options, and make sure that each combination makes a task, of the tokens that
        were learned where that is known."""
        from intarsia.tasks import make_task
        from intarsia.tasks.mixed import combinations

        values = {}
        for name, given in getattr(self, table).items():
            if not given or len({repr(value) for value in given}) < len(given):
                raise PlanError("must be a list of different values", (table, name))
            values[name] = tuple(with_none(given))
        object.__setattr__(self, table, values)
        for turn in combinations(values):
            shown = ", ".join(f"{name} {value}" for name, value in turn.items())
            try:
                task = make_task(self.task, {**self.options, **turn})
            except OptionError as error:
                raise PlanError(f"with {shown}: {error.message}", (table, *error.path[1:])) from None
            except ConfigError as error:
                raise PlanError(f"with {shown}: {error}", (table,)) from None
            if learned is not None and task.vocab_size > learned.vocab_size:
                raise PlanError(
                    f"with {shown} the task has {task.vocab_size} different tokens, and the models learn "
                    f"{learned.vocab_size}: give `options` that need as many",
                    (table,),
                )


EXAM_TRAINING: Mapping[str, Any] = MappingProxyType(
    {
        "optimizer": "adamw",
        "schedule": "cosine",
        "final_lr_fraction": 0.1,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
    }
)
"""How a task is learned unless the plan says otherwise, with a warm-up of a twentieth of the steps."""


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise PlanError(
            f"{name!r} must be letters, digits, '.', '_' and '-': it names directories", ("name",)
        )


def check_rates(rates: tuple[float, ...], path: tuple[str | int, ...]) -> None:
    if not rates:
        raise PlanError("at least one learning rate is needed", path)
    if len(set(rates)) < len(rates) or min(rates) <= 0:
        raise PlanError(f"must be different and above 0; got {list(rates)}", path)
