"""The directory of a training run: where things are, and which run it is."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import CheckpointError
from intarsia.files import write_json
from intarsia.training.config import FREE_FIELDS


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run.

    config.json         what the run is: model, training options, fingerprints of the data
    metrics.jsonl       a line per `log_every` steps and per evaluation
    evaluations/        step-000500.npz: likelihood and size of every evaluated document
    checkpoints/        step-000500/: all that is needed to go on
    model/              the trained model, when the run is finished
    result.json         the outcome, when the run is finished
    tensorboard/        events, if asked for
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def evaluation(self, step: int) -> Path:
        """The file of the evaluation after `step` steps."""
        return self.evaluations / f"step-{step:06d}.npz"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running in this directory. The lock goes with the process that holds it.

        Raises:
            CheckpointError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process is at work in {self.path}: wait for it or stop it"
                ) from None
            yield

    def check(self, identity: dict[str, Any]) -> None:
        """Make sure that no other run than the one that `identity` describes is here.

        Raises:
            CheckpointError: there is one. The message names the fields that differ.
        """
        if self.config.exists():
            differences = compare(read_json(self.config), identity)
            if differences:
                listed = "".join(f"\n  {line}" for line in differences)
                raise CheckpointError(
                    f"{self.path} holds a run that was started differently:{listed}\n"
                    "Resume it with what it was started with, remove it, or choose another directory."
                )

    def claim(self, identity: dict[str, Any]) -> None:
        """Write down which run this is."""
        write_json(self.config, identity)


def compare(started: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each field in which two identities differ, other than those that may change."""
    before, after = _flatten(started), _flatten(now)
    lines = []
    for name in sorted({*before, *after}):
        if name.removeprefix("train.") in FREE_FIELDS:
            continue
        if before.get(name) != after.get(name):
            was, is_now = (_show(values, name) for values in (before, after))
            lines.append(f"{name}: {was} in the run, {is_now} now")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object and does not")
    return value


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat


def _show(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
