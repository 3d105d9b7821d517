"""The directory of a training run: where things are, and which run it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import CheckpointError
from intarsia.files import message_of, write_json
from intarsia.jobs.locks import locked
from intarsia.training.config import DATA_FIELDS, FREE_FIELDS, LASTING_FIELDS, SCHEDULE_FIELDS


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run.

    config.json         what the run is: model, training options, fingerprints of the data and of the code that trains;
                        where it branched off, and what it went on with otherwise
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
        busy = CheckpointError(f"another process is at work in {self.path}: wait for it or stop it")
        with locked(self.path / ".lock", busy):
            yield

    def read(self) -> dict[str, Any] | None:
        """What run is here, if any.

        Raises:
            CheckpointError: `config.json` is damaged; the message says what to do.
        """
        if not self.config.exists():
            return None
        try:
            return read_json(self.config)
        except CheckpointError as error:
            advice = (
                "The checkpoints hold a copy of what it said: remove it, and give the same command again to go on."
                if self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))
                else f"There is no checkpoint to go on from: remove {self.path} and start again."
            )
            raise CheckpointError(f"{error}. {advice}") from error

    def check(self, started: dict[str, Any], now: dict[str, Any]) -> None:
        """Make sure that the run which was `started` here is the one that is wanted `now`.

        What a run may go on with otherwise is not compared, nor is the learning rate's schedule, which depends on how
        far the run is.

        Raises:
            CheckpointError: it is another. The message names the fields that differ, and what could be done.
        """
        differences = [d for d in compare(started, now) if d.field not in SCHEDULE_FIELDS | FREE_FIELDS]
        if not differences:
            return
        listed = "".join(f"\n  {one}" for one in differences)
        lasting = [d for d in differences if d.is_lasting]
        advice = (
            "Another model, other data or another order of the data need a new run, in another directory."
            if lasting
            else f"From here on they can be changed in a run that branches off: `--from {self.path}@STEP`, in another "
            "directory."
        )
        raise CheckpointError(
            f"{self.path} holds a run that was started differently:{listed}\n"
            f"Go on with what it was started with, or remove it. {advice}"
        )

    def claim(self, record: dict[str, Any]) -> None:
        """Write down which run this is."""
        write_json(self.config, record)


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ."""

    name: str
    was: str
    now: str

    @property
    def field(self) -> str:
        """Of TrainConfig; empty for another."""
        return self.name.removeprefix("train.") if self.name.startswith("train.") else ""

    @property
    def is_lasting(self) -> bool:
        """Whether runs that branch off have it in common too: the model, the data and their order."""
        return not self.field or self.field in LASTING_FIELDS

    def __str__(self) -> str:
        what = "another order of the data" if self.field in DATA_FIELDS else ""
        what = "another model" if self.name.startswith("model.") else what
        return f"{self.name}: {self.was} in the run, {self.now} now" + (f" ({what})" if what else "")


def compare(started: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """The fields of model, training and data in which two runs differ."""
    before, after = (_flatten({part: run.get(part) or {} for part in PARTS}) for run in (started, now))
    return [
        Difference(name, _show(before, name), _show(after, name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


PARTS = ("model", "train", "data", "beginning")
"""Of the record of a run: what it is. The rest tells how it came about."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {message_of(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or was cut off: it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a JSON object and does not")
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
