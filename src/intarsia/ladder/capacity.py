"""How many runs are made at a time, with how many threads, and how long a comparison has taken so far."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import ConfigError
from intarsia.files import write_json
from intarsia.jobs.machine import available_memory, cores
from intarsia.jobs.pool import Machines, Pool, Workers
from intarsia.model import ModelConfig
from intarsia.training import TrainConfig

FILE = "comparison.json"


@dataclass(frozen=True)
class Capacity:
    """What a comparison has of its machine."""

    jobs: int
    """Training runs at a time."""
    threads: int
    """Of each run. Kept for the directory's lifetime: another number rounds differently."""
    machines: Machines | None = None
    """Where runs are made; None: on this one."""

    @classmethod
    def of(
        cls, directory: Path, jobs: int | None, possible: int, machines: Machines | None = None
    ) -> Capacity:
        """What is used in a comparison's directory: what it was begun with, as far as that decides numbers.

        Args:
            jobs: what was asked for; None for what is `possible`.
            possible: how many runs fit (`possible_jobs`).
            machines: where runs are made, if not on this one.

        Raises:
            ConfigError: the directory was begun with more threads than any of the machines has cores.
        """
        state = read_state(directory)
        there, widest = (cores(), None) if machines is None else (machines.cores, machines.widest)
        if jobs is None:
            jobs = possible
            if "threads" in state:
                jobs = max(1, min(jobs, there // state["threads"]))
        threads = int(state.get("threads", max(1, min(there // jobs, widest or there))))
        if widest is not None and threads > widest:
            raise ConfigError(
                f"runs in {directory} take {threads} threads, as they began, and no machine of the cluster has more "
                f"than {widest}: choose another directory, or a larger machine"
            )
        write_json(directory / FILE, {**state, "threads": threads})
        return cls(jobs, threads, machines)

    def workers(self) -> Workers:
        """What makes the runs."""
        return Pool() if self.machines is None else self.machines.workers()


def read_state(directory: Path) -> dict[str, Any]:
    """What a comparison keeps of itself from one sitting to the next."""
    path = directory / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep_time(directory: Path, seconds: float) -> float:
    """Add to the time that a comparison took in all its sittings, and return it."""
    state = read_state(directory)
    total = float(state.get("seconds", 0.0)) + seconds
    write_json(directory / FILE, {**state, "seconds": total})
    return total


def possible_jobs(runs: int, bytes_of_runs: Iterable[int], machines: Machines | None = None) -> int:
    """As many runs at a time as there are cores and memory for; one on a GPU.

    Args:
        runs: how many there are.
        bytes_of_runs: the memory that each kind of run needs (`run_bytes`).
        machines: where runs are made, if not on this one.
    """
    import torch

    if machines is not None:
        return max(1, machines.jobs(runs, max(bytes_of_runs)))

    if torch.cuda.is_available():
        return 1
    return max(1, min(runs, cores(), int(available_memory() * 0.7 // max(bytes_of_runs))))


def run_bytes(parameters: int, model: ModelConfig, config: TrainConfig) -> int:
    """The memory that a run takes at most: a guess that errs on the large side.

    Float32 weights, gradients, two moments and a checkpoint's copy. What the backward pass needs: 20 to 72 numbers of
    the model's width for each token of a forward pass and each layer, by its mixer, and some for what is being
    computed. The interpreter with PyTorch.
    """
    tokens = (config.micro_rows or config.rows) * config.length
    return 20 * parameters + 4 * 80 * tokens * model.depth * model.d_model + 400 * 2**20
