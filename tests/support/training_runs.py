"""What the tests of whole training runs share: comparing runs, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from intarsia.data import TokenDataset
from intarsia.model import ModelConfig
from intarsia.training import NoProgress, TrainConfig, read_metrics
from intarsia.training.metrics import TIMINGS

WORKER = Path(__file__).with_name("training_worker.py")


class Interrupt(NoProgress):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: int = signal.SIGTERM, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times
        self.notes: list[str] = []

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        if done == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def note(self, text: str) -> None:
        self.notes.append(text)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what the clock says."""
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in read_metrics(directory / "metrics.jsonl")
    ]


def weights_of(directory: Path) -> dict[str, Any]:
    """The weights of a finished run."""
    return load_file(directory / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Equal to the bit: weights, metrics, and the result but for the time that it took."""
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name
    assert metrics_of(a) == metrics_of(b)
    results = [json.loads((directory / "result.json").read_text()) for directory in (a, b)]
    for result in results:
        for key in TIMINGS:
            del result[key]
    assert results[0] == results[1]


@dataclass(frozen=True)
class Job:
    """A training run for processes of its own."""

    directory: Path
    config: TrainConfig
    interrupt: tuple[int, int] | None = None
    """The rank of a process that sends itself SIGTERM, and after which step."""
    copy_of: Path | None = None
    """Go on from a copy of this directory."""
    parent: Path | None = None
    """Branch off from the run in this directory."""


def start(
    jobs: Sequence[Job], model: ModelConfig, dataset: TokenDataset, processes: int = 1
) -> list[subprocess.Popen[str]]:
    """Start processes, connected as torchrun would, that make some runs one after the other."""
    described = [
        {
            "model": model.to_dict(),
            "train": job.config.to_dict(),
            "dataset": str(dataset.directory),
            "directory": str(job.directory),
            "interrupt": job.interrupt,
            "copy_of": None if job.copy_of is None else str(job.copy_of),
            "parent": None if job.parent is None else str(job.parent),
        }
        for job in jobs
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE"] = str(processes)
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(described)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 600) -> list[list[dict[str, Any]]]:
    """Wait for the runs and give what each process reported of each of them: a list a run."""
    reports = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
            reports.append([json.loads(line) for line in output.splitlines() if line.startswith("{")])
    finally:
        for process in processes:
            process.kill()
    return [list(of_a_run) for of_a_run in zip(*reports, strict=True)]
