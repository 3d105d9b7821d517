"""One training run of a comparison on the disk: whether it is done, and what came out.

A run's directory has a name made from what the run is, so that a plan can be changed and started again: runs
that are still wanted are found done, others are made, and none is mistaken for another.

    spec.json        what the run is, and what the child process needs
    train/           the directory of the training run (`intarsia.training.RunDirectory`)
    evaluation.npz   likelihood of every tuning or judged document, where the run learned text
    outcome.json     written last: the run is done
    failure.json     the run failed; one of the two is there, or neither
    log.txt          what the child process printed
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from intarsia.errors import CheckpointError
from intarsia.files import write_json
from intarsia.ladder.results import CurvePoint, ExamScores, Failure, PositionLoss, RunResult, Turn
from intarsia.ladder.run_spec import RunSpec, TextLesson
from intarsia.tasks import Answers


@dataclass(frozen=True)
class RunFolder:
    """The directory of one run."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def train(self) -> Path:
        return self.path / "train"

    @property
    def model(self) -> Path:
        return self.train / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.npz"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def claim(self, spec: RunSpec) -> None:
        """Make the directory that of the run, or make sure that it is.

        A failure that may not happen again is forgotten here.

        Raises:
            CheckpointError: another run is in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.spec.exists() and RunSpec.load(self.path).key != spec.key:
            raise CheckpointError(f"{self.path} holds another run: remove it, or choose another directory")
        write_json(self.spec, spec.to_dict())
        failure = self.read_failure()
        if failure is not None and not failure.is_final:
            self.failure.unlink()

    @property
    def state(self) -> Literal["done", "failed", "open"]:
        if self.outcome.exists():
            return "done"
        failure = self.read_failure()
        return "failed" if failure is not None and failure.is_final else "open"

    def read_failure(self) -> Failure | None:
        """How the run failed, if it did."""
        if self.outcome.exists() or not self.failure.exists():
            return None
        values = json.loads(self.failure.read_text(encoding="utf-8"))
        return Failure(kind=values["kind"], message=values["message"])

    def write_failure(self, failure: Failure) -> None:
        """Say that the run failed."""
        write_json(self.failure, asdict(failure))

    def read(self, spec: RunSpec) -> RunResult:
        """The run as far as it came: done, or failed.

        Raises:
            CheckpointError: it is neither.
        """
        common: dict[str, Any] = {
            "arm": spec.arm,
            "learning_rate": spec.learning_rate,
            "seed": spec.seed,
            "role": spec.role,
            "directory": self.path.name,
            "lesson": spec.lesson.name,
        }
        if isinstance(spec.lesson, TextLesson):
            common |= self._curves(spec, spec.lesson)
        if self.state != "done":
            failure = self.read_failure()
            if failure is None:
                raise CheckpointError(f"the run in {self.path} is neither done nor failed")
            return RunResult(failure=failure, **common)
        outcome = json.loads(self.outcome.read_text(encoding="utf-8"))
        common |= {name: outcome[name] for name in ("seconds", "tokens")}
        if isinstance(spec.lesson, TextLesson):
            return RunResult(batches=outcome["batches"], **self._scores(spec), **common)
        validation, test = (
            None if outcome[split] is None else Answers.from_dict(outcome[split])
            for split in ("validation", "test")
        )
        assert validation is not None
        turns = tuple(Turn(each["options"], Answers.from_dict(each["test"])) for each in outcome["turns"])
        return RunResult(exam=ExamScores(validation, test, outcome["steps"], turns), **common)

    def _scores(self, spec: RunSpec) -> dict[str, Any]:
        with np.load(self.evaluation) as arrays:
            bits = arrays["nll"] / math.log(2)
            text_bytes = arrays["text_bytes"]
            sums, counts = arrays["position_nll"] / math.log(2), arrays["position_tokens"]
        if spec.role == "tuning":
            return {
                "tuning_bits_per_byte": float(bits.sum() / text_bytes.sum()),
                "tuning_documents": (bits, text_bytes.astype(np.float64)),
            }
        positions = tuple(
            PositionLoss(2**index // 2, 2**index, float(total / count), int(count))
            for index, (total, count) in enumerate(zip(sums, counts, strict=True))
            if count
        )
        return {"bits": bits, "positions": positions}

    def _curves(self, spec: RunSpec, lesson: TextLesson) -> dict[str, tuple[CurvePoint, ...]]:
        from intarsia.training.metrics import read_metrics

        lines = read_metrics(self.train / "metrics.jsonl")
        per_step = int(spec.train["rows"] * spec.train["length"])
        factor = 1 / (math.log(2) * lesson.bytes_per_token)
        training = tuple(
            CurvePoint(line["step"] * per_step, line["loss"] * factor)
            for line in lines
            if line["kind"] == "train" and math.isfinite(line["loss"])
        )
        heldout = tuple(
            CurvePoint(line["step"] * per_step, line["bits_per_byte"])
            for line in lines
            if line["kind"] == "eval" and spec.train.get("eval_every")
        )
        return {"training_curve": training, "heldout_curve": heldout}
