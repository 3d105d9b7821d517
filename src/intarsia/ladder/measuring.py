"""What is to be measured of the models when all training is done, and having it measured.

Speeds that were read while several runs shared the cores would compare the runs' neighbours. So a process of its own
(`measure.py`) does nothing but measure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.files import write_json
from intarsia.jobs.board import Board
from intarsia.jobs.pool import Pool, describe_exit
from intarsia.ladder.results import Decoding, Measurements, Sample

if TYPE_CHECKING:
    from rich.console import Console

SPEC, RESULT = "measure.json", "measurements.json"


@dataclass(frozen=True)
class MeasuredArm:
    """One arm to measure. `run` is the directory of a finished judged run, if there is one; other code is measured
    anew (`Fingerprint.decisive`)."""

    name: str
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    run: str | None
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class MeasureSpec:
    """What is to be measured."""

    arms: tuple[MeasuredArm, ...]
    dataset: str
    data_fingerprint: str
    contexts: tuple[int, ...]
    decode_tokens: int
    repeats: int
    throughput_steps: int
    prompts: tuple[str, ...]
    sample_tokens: int
    temperature: float
    top_p: float
    threads: int
    machine: str
    """The processor's name: other machines measure anew."""

    @property
    def key(self) -> str:
        """Hex digits of everything that was asked for."""
        values = {name: value for name, value in asdict(self).items() if name != "dataset"} | {"form": 2}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, directory: Path) -> MeasureSpec:
        """The spec that the parent wrote."""
        values: dict[str, Any] = json.loads((directory / SPEC).read_text(encoding="utf-8"))
        for name in ("contexts", "prompts"):
            values[name] = tuple(values[name])
        values["arms"] = tuple(MeasuredArm(**arm) for arm in values["arms"])
        return cls(**values)

    @property
    def rounds(self) -> int:
        """Units of work, for a progress bar."""
        samples = len(self.prompts or ("",)) * sum(arm.run is not None for arm in self.arms)
        return len(self.arms) * (len(self.contexts) * self.repeats + self.throughput_steps) + (
            samples if self.sample_tokens else 0
        )


def read_measurements(
    directory: Path, spec: MeasureSpec, *, complete: bool
) -> tuple[dict[str, Measurements], tuple[Sample, ...]] | None:
    """What was measured for this very spec; None if nothing was, or not all where it must be `complete`."""
    path = directory / RESULT
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["key"] != spec.key or (complete and not values["complete"]):
        return None
    measurements = {name: _read_arm(arm) for name, arm in values["arms"].items()}
    return measurements, tuple(Sample(**sample) for sample in values["samples"])


def _read_arm(values: Mapping[str, Any]) -> Measurements:
    decoding = tuple(Decoding(**{**cost, "range": tuple(cost["range"])}) for cost in values["decoding"])
    if values["training"] is None:
        return Measurements(decoding)
    median, low, high = values["training"]
    return Measurements(decoding, median, (low, high))


def measure(
    directory: Path, spec: MeasureSpec, console: Console
) -> tuple[dict[str, Measurements], tuple[Sample, ...]]:
    """What the spec asks for, measured now unless it was before. What cannot be measured is missing."""
    known = read_measurements(directory, spec, complete=True)
    if known is None and spec.rounds:
        write_json(directory / SPEC, asdict(spec))
        _run_child(directory, spec, console)
        known = read_measurements(directory, spec, complete=False)
    return known or ({}, ())


def _run_child(directory: Path, spec: MeasureSpec, console: Console) -> None:
    pool = Pool(grace=1.0)
    key, log = "measure", directory / "measure.log"
    with Board(console, "measuring", 1, spec.rounds) as board:
        board.start(key, "speed, memory and samples, one model at a time", spec.rounds)
        pool.start(key, "intarsia.ladder.measure", directory, log, spec.threads)
        try:
            while pool.children:
                happened = pool.wait(0.25)
                if happened is None:
                    continue
                event = happened[1]
                if not isinstance(event, int):
                    if event.get("event") == "step":
                        board.step(key, event["done"], None, None)
                elif event == 0:
                    board.finish(key, "done")
                else:
                    board.finish(key, f"{describe_exit(event)}; see {log}", good=False)
        except BaseException:
            pool.stop()
            raise
