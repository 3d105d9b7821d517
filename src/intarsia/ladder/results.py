"""What the runs of a comparison left behind, in the form in which it is judged and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from intarsia.ladder.statistics import Array

RunRole = Literal["tuning", "judged"]
FailureKind = Literal["diverged", "killed", "crashed"]


@dataclass(frozen=True)
class Failure:
    """How a run ended that did not finish.

    `diverged`: the loss was no longer finite. That is a result: it is kept and not tried again.
    `killed`: ended by a signal, as by the kernel when memory is short. `crashed`: any other error. Both are
    tried again when the comparison is started again.
    """

    kind: FailureKind
    message: str

    @property
    def is_final(self) -> bool:
        return self.kind == "diverged"


@dataclass(frozen=True)
class CurvePoint:
    """One point of a training curve. `bits_per_byte` is of training text, or of tuning documents."""

    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class RunResult:
    """One training run: an arm at a learning rate with a seed.

    `tuning_bits_per_byte` is of the tuning documents. `bits` [D] are of the judged documents, in their order;
    a tuning run has none, so that nobody can choose by them.
    """

    arm: str
    learning_rate: float
    seed: int
    role: RunRole
    failure: Failure | None = None
    tuning_bits_per_byte: float | None = None
    bits: Array | None = None
    batches: str = ""
    """Digest over the digests of all batches, in order."""
    seconds: float = 0.0
    tokens: int = 0
    training_curve: tuple[CurvePoint, ...] = ()
    heldout_curve: tuple[CurvePoint, ...] = ()
    directory: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm} lr {self.learning_rate:g} seed {self.seed}"


@dataclass(frozen=True)
class Decoding:
    """The cost of decoding at one context."""

    context: int
    milliseconds: float
    """Median time for one token at batch 1."""
    cache_bytes: int
    """Bytes of all layers' states, measured on the tensors."""


@dataclass(frozen=True)
class Measurements:
    """What one arm's model costs, measured on this machine."""

    decoding: tuple[Decoding, ...] = ()
    training_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote after a prompt."""

    arm: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Baseline:
    """A reference row: bits per byte of the judged documents under a model that needs no training."""

    name: str
    bits: Array
    parameters: int | None = None
    note: str = ""


@dataclass(frozen=True)
class ArmResult:
    """An arm with its runs."""

    name: str
    note: str
    layout: str
    parameters: int
    non_embedding_parameters: int
    learning_rate: float | None
    """The rate that was chosen; None where every run of the choice failed."""
    grid: tuple[float, ...]
    runs: tuple[RunResult, ...]
    training_flops_per_token: float | None = None
    change: str = ""
    """What matching changed in the configuration."""
    model: Mapping[str, Any] = field(default_factory=dict)
    measurements: Measurements = Measurements()

    @property
    def judged(self) -> dict[int, RunResult]:
        """The finished judged runs by seed."""
        return {run.seed: run for run in self.runs if run.role == "judged" and run.failure is None}

    @property
    def failed(self) -> tuple[RunResult, ...]:
        """The judged runs that failed."""
        return tuple(run for run in self.runs if run.role == "judged" and run.failure is not None)

    @property
    def tuning_scores(self) -> dict[float, float | None]:
        """Bits per byte on the tuning documents for each rate that was tried; None for a failed run."""
        return {run.learning_rate: run.tuning_bits_per_byte for run in self.runs if run.role == "tuning"}


@dataclass(frozen=True)
class Results:
    """Everything that a comparison produced, before it is judged."""

    arms: tuple[ArmResult, ...]
    text_bytes: Array
    """Bytes of the judged documents [D]."""
    tuning_documents: int
    corpus: str
    tokenizer: str
    steps: int
    tokens_per_run: int
    training_tokens: int = 0
    """Tokens of the corpus's training split: how often a run has read it follows."""
    baselines: tuple[Baseline, ...] = ()
    samples: tuple[Sample, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def runs(self) -> list[RunResult]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def failed(self) -> list[RunResult]:
        return [run for run in self.runs if run.failure is not None]

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.name == name)


def choose_rate(scores: Mapping[float, float | None]) -> float | None:
    """The learning rate with the lowest score; failed runs have none. Of equals the smaller rate."""
    finished = [(score, rate) for rate, score in scores.items() if score is not None]
    return min(finished)[1] if finished else None
