"""What the runs of a comparison left behind, in the form in which it is judged and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from intarsia.ladder.student import Array
from intarsia.tasks.exam import Answers

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
class PositionLoss:
    """The mean loss of the targets at positions `start` to `stop` (excluded) of their pieces, over all documents."""

    start: int
    stop: int
    bits_per_token: float
    tokens: int


@dataclass(frozen=True)
class Turn:
    """Answers to test examples of an exam under changed options."""

    options: Mapping[str, Any]
    test: Answers


@dataclass(frozen=True)
class ExamScores:
    """What a run has learned of a task."""

    validation: Answers
    test: Answers | None
    """Of a judged run; a tuning run has none, so that nobody can choose by it."""
    steps: int
    """After which nothing was wrong in the validation, or the budget was spent."""
    turns: tuple[Turn, ...] = ()
    """Of a judged run: the exam under other options."""


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
    tuning_documents: tuple[Array, Array] | None = None
    """Bits and bytes of each tuning document, of a tuning run."""
    bits: Array | None = None
    batches: str = ""
    """Digest over the digests of all batches, in order."""
    seconds: float = 0.0
    tokens: int = 0
    positions: tuple[PositionLoss, ...] = ()
    """Of a judged run: how well it predicts early and late in a piece."""
    training_curve: tuple[CurvePoint, ...] = ()
    heldout_curve: tuple[CurvePoint, ...] = ()
    directory: str = ""
    lesson: str = ""
    """The name of the exam that it was for; empty for one that learned text."""
    exam: ExamScores | None = None
    """Of a finished run for an exam."""

    @property
    def subject(self) -> str:
        """Whom the run is of: the arm, or the arm on an exam."""
        return f"{self.lesson} {self.arm}".strip()

    @property
    def name(self) -> str:
        return f"{self.subject} lr {self.learning_rate:g} seed {self.seed}"

    @property
    def tuning_score(self) -> tuple[float, ...] | None:
        """What learning rates are chosen by: the lowest is the best. None for a failed run."""
        if self.exam is not None:
            score = self.exam.validation.score
            return -score.token_accuracy, -score.sequence_accuracy, self.exam.steps
        return None if self.tuning_bits_per_byte is None else (self.tuning_bits_per_byte,)

    @property
    def is_perfect(self) -> bool:
        """Whether no better score is possible."""
        return self.exam is not None and self.exam.validation.score.token_accuracy == 1

    @property
    def summary(self) -> str:
        """How it went, in a line."""
        text = f"{self.seconds:.0f} s"
        if self.exam is not None:
            right = self.exam.validation.score.token_accuracy
            return f"{right:.1%} of the validation's answers after {self.exam.steps} steps, {text}"
        if self.tuning_bits_per_byte is not None:
            return f"{self.tuning_bits_per_byte:.4f} bits per byte on the tuning documents, {text}"
        return text


@dataclass(frozen=True)
class Decoding:
    """The cost of decoding at one context."""

    context: int
    milliseconds: float
    """Median time for one token at batch 1."""
    cache_bytes: int
    """Bytes of all layers' states, measured on the tensors."""
    range: tuple[float, float] | None = None
    """Between which milliseconds the middle half of the timings lay."""


@dataclass(frozen=True)
class Measurements:
    """What one arm's model costs, measured on this machine."""

    decoding: tuple[Decoding, ...] = ()
    training_tokens_per_second: float | None = None
    training_range: tuple[float, float] | None = None
    """Between which tokens per second the middle half of the timed steps lay."""


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
    """The rates that were tried, or the one that was given."""
    runs: tuple[RunResult, ...]
    beyond: tuple[float, ...] = ()
    """Those of `grid` that the plan did not name, tried since the best was at an end."""
    steps: int = 0
    tokens: int = 0
    """Of each judged run."""
    active_parameters: int = 0
    """Those without embeddings that compute a token."""
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


def _over_seeds(shares: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean, least and most; None of nothing."""
    return (sum(shares) / len(shares), min(shares), max(shares)) if shares else None


@dataclass(frozen=True)
class ExamArm:
    """An arm on one exam."""

    name: str
    parameters: int
    """Without embeddings."""
    learning_rate: float | None
    grid: tuple[float, ...]
    """The rates that were tried, or the one that was given."""
    runs: tuple[RunResult, ...]
    beyond: tuple[float, ...] = ()
    """Those of `grid` that the plan did not name, tried since the best was at an end."""

    @property
    def judged(self) -> dict[int, tuple[float, float]]:
        """For each seed whose run came to an end: the shares of right answers and of sequences without a mistake. A
        model that came apart (diverged) knows nothing."""
        found = {}
        for run in self.runs:
            if run.role == "judged" and run.exam is not None and run.exam.test is not None:
                score = run.exam.test.score
                found[run.seed] = (score.token_accuracy, score.sequence_accuracy)
            elif run.role == "judged" and run.failure is not None and run.failure.is_final:
                found[run.seed] = (0.0, 0.0)
        return found

    @property
    def answers(self) -> tuple[float, float, float] | None:
        """Mean, least and most of the shares of right answers, over seeds; None if no run came to an end."""
        return _over_seeds([answers for answers, _ in self.judged.values()])

    def turned(self, options: Mapping[str, Any]) -> tuple[float, float, float] | None:
        """The same under changed options of the exam."""
        shares = []
        for run in self.runs:
            if run.role == "judged" and run.exam is not None:
                found = [turn.test for turn in run.exam.turns if turn.options == options]
                shares += [answers.score.token_accuracy for answers in found]
            elif run.role == "judged" and run.failure is not None and run.failure.is_final:
                shares.append(0.0)
        return _over_seeds(shares)

    @property
    def sequences(self) -> float | None:
        """Mean share of sequences without a mistake."""
        shares = [sequences for _, sequences in self.judged.values()]
        return sum(shares) / len(shares) if shares else None

    @property
    def at_edge(self) -> bool:
        """Whether the rate that was chosen is at an end of its grid."""
        return len(self.grid) > 1 and self.learning_rate in (min(self.grid), max(self.grid))


@dataclass(frozen=True)
class ExamResult:
    """One exam, with all arms."""

    name: str
    task: str
    title: str
    options: Mapping[str, Any]
    steps: int
    rows: int
    examples: int
    arms: tuple[ExamArm, ...]
    dials: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    mixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def arm(self, name: str) -> ExamArm:
        return next(arm for arm in self.arms if arm.name == name)


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
    """Of the arm that read most; all read as many where the budget is one of tokens or steps."""
    length: int = 0
    """Tokens of a piece: no prediction saw more context."""
    training_tokens: int = 0
    """Tokens of the corpus's training split: how often a run has read it follows."""
    baselines: tuple[Baseline, ...] = ()
    samples: tuple[Sample, ...] = ()
    exams: tuple[ExamResult, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def runs(self) -> list[RunResult]:
        """All runs, those for exams last."""
        return [run for arm in self.arms for run in arm.runs] + [
            run for exam in self.exams for arm in exam.arms for run in arm.runs
        ]

    @property
    def failed(self) -> list[RunResult]:
        return [run for run in self.runs if run.failure is not None]

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.name == name)


NO_TEXT = Results((), np.zeros(0), 0, "", "", 0, 0)
"""Of a plan that has exams alone."""


def choose_rate(scores: Mapping[float, tuple[float, ...] | None]) -> float | None:
    """The learning rate with the lowest score; failed runs have none. Of equals the smaller rate."""
    finished = [(score, rate) for rate, score in scores.items() if score is not None]
    return min(finished)[1] if finished else None
