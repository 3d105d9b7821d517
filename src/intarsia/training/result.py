"""How a training run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intarsia.errors import CheckpointError
from intarsia.files import write_json
from intarsia.training.evaluate import Evaluation
from intarsia.training.run_directory import RunDirectory, read_json


@dataclass(frozen=True, eq=False)
class TrainResult:
    """How a run ended."""

    directory: Path
    finished: bool
    """False: it was interrupted, and goes on when it is started again."""
    step: int
    """Finished optimizer steps."""
    loss: float
    """Mean training loss of the last line of metrics, in nats per token."""
    tokens: int
    """Training tokens, over all processes."""
    seconds: float
    """Spent in training steps; evaluation and checkpoints not counted."""
    batches: str
    """A digest of all batches and of their order: equal for runs that saw the same data."""
    evaluation: Evaluation | None = None
    """Of the finished model; None if the run is not finished or nothing is held out."""

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second, over all processes."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def model_directory(self) -> Path:
        """Where the trained model is, once the run is finished."""
        return RunDirectory(self.directory).model

    def save(self) -> None:
        """Write `result.json`, which marks the run as finished."""
        summary = {
            "step": self.step,
            "loss": self.loss,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "batches": self.batches,
            "evaluation": None if self.evaluation is None else self.evaluation.summary(),
        }
        write_json(RunDirectory(self.directory).result, summary)

    @classmethod
    def load(cls, directory: Path) -> TrainResult:
        """The result of a finished run.

        Raises:
            CheckpointError: the run is not finished, or its result cannot be read.
        """
        run = RunDirectory(directory)
        if not run.result.exists():
            raise CheckpointError(f"{directory} holds no finished run: it has no {run.result.name}")
        try:
            values = read_json(run.result)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Remove it and give the same command again: the run goes on from its newest checkpoint"
            ) from error
        try:
            kept = {name: values[name] for name in ("step", "loss", "tokens", "seconds", "batches")}
            scored = values["evaluation"] is not None
            evaluation = Evaluation.load(run.evaluation(kept["step"])) if scored else None
        except KeyError as error:
            raise CheckpointError(f"{run.result} is not of this version: it has no {error}") from error
        return cls(directory=directory, finished=True, evaluation=evaluation, **kept)
