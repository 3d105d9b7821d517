"""One training run of a comparison on the disk: what it is, whether it is done, what came out.

A run's directory has a name made from what the run is, so that a plan can be changed and started again: runs
that are still wanted are found done, others are made, and none is mistaken for another.

    spec.json        what the run is, and what the child process needs
    train/           the directory of the training run (`intarsia.training.RunDirectory`)
    evaluation.npz   likelihood of every tuning or judged document
    outcome.json     written last: the run is done
    failure.json     the run failed; one of the two is there, or neither
    log.txt          what the child process printed
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from intarsia.errors import CheckpointError
from intarsia.files import write_json
from intarsia.ladder.results import CurvePoint, Failure, RunResult, RunRole
from intarsia.model.fingerprint import DECISIVE, changes

UNDECISIVE = ("dataset", "device")
"""Fields of a spec that do not decide its numbers: a place, whose content has a fingerprint, and `auto`, of which the
fingerprint says what it was."""


@dataclass(frozen=True)
class RunSpec:
    """All that decides the numbers of a run."""

    arm: str
    learning_rate: float
    seed: int
    role: RunRole
    model: Mapping[str, Any]
    """`ModelConfig.to_dict()`."""
    train: Mapping[str, Any]
    """`TrainConfig.to_dict()`."""
    dataset: str
    """The directory of the prepared data; its content counts and not its place."""
    data_fingerprint: str
    documents: tuple[int, ...]
    """The held-out documents that are scored in the end: tuning or judged ones."""
    tokens_per_document: int | None
    bytes_per_token: float
    """Of the training text: brings the training loss to bits per byte, by one factor for all arms."""
    fingerprint: Mapping[str, Any]
    """`Fingerprint.to_dict()`: the code, the libraries and the arithmetic. Its commits decide nothing."""
    threads: int
    """Of the child process. It changes rounding, so a comparison keeps to one number."""
    device: str = "auto"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON-able values."""
        values = {name: value for name, value in asdict(self).items() if name not in UNDECISIVE}
        return {**values, "fingerprint": {part: self.fingerprint.get(part) for part in DECISIVE}}

    @property
    def key(self) -> str:
        """Hex digits of everything that decides the numbers."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        return f"{self.arm} lr {self.learning_rate:g} seed {self.seed}"

    @property
    def directory_name(self) -> str:
        return f"{self._directory_prefix}{self.key[:8]}"

    @property
    def _directory_prefix(self) -> str:
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}-"

    @property
    def steps(self) -> int:
        return int(self.train["steps"])

    @property
    def tokens(self) -> int:
        return int(self.train["steps"] * self.train["rows"] * self.train["length"])

    @classmethod
    def load(cls, directory: Path) -> RunSpec:
        """The spec that is in a run's directory."""
        values = json.loads((directory / "spec.json").read_text(encoding="utf-8"))
        return cls(**{**values, "documents": tuple(values["documents"])})

    def changed_since(self, directory: Path) -> list[str]:
        """In words, why the newest run in `directory` (the directory of all runs) that is this one by the plan is not
        this one after all: other code, libraries or arithmetic. Nothing where there is none, or where it is this one.
        """
        found = [path for path in directory.glob(f"{self._directory_prefix}*/spec.json") if path.is_file()]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                other = RunSpec.load(path.parent)
            except (ValueError, TypeError, KeyError):  # a spec of another version of this package
                continue
            if {**other.identity, "fingerprint": None} == {**self.identity, "fingerprint": None}:
                return changes(other.fingerprint, self.fingerprint)
        return []


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
        write_json(self.spec, asdict(spec))
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
            **self._curves(spec),
        }
        if self.state != "done":
            failure = self.read_failure()
            if failure is None:
                raise CheckpointError(f"the run in {self.path} is neither done nor failed")
            return RunResult(failure=failure, **common)
        outcome = json.loads(self.outcome.read_text(encoding="utf-8"))
        with np.load(self.evaluation) as arrays:
            bits = arrays["nll"] / math.log(2)
            text_bytes = arrays["text_bytes"]
        tuning = spec.role == "tuning"
        return RunResult(
            batches=outcome["batches"],
            seconds=outcome["seconds"],
            tokens=outcome["tokens"],
            tuning_bits_per_byte=float(bits.sum() / text_bytes.sum()) if tuning else None,
            bits=None if tuning else bits,
            **common,
        )

    def _curves(self, spec: RunSpec) -> dict[str, tuple[CurvePoint, ...]]:
        from intarsia.training.metrics import read_metrics

        lines = read_metrics(self.train / "metrics.jsonl")
        per_step = int(spec.train["rows"] * spec.train["length"])
        factor = 1 / (math.log(2) * spec.bytes_per_token)
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
