"""One process of training runs: `python training_worker.py JOBS`, the jobs in JSON. See `training_runs.start`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from intarsia.data import TokenDataset
from intarsia.errors import IntarsiaError
from intarsia.model import ModelConfig
from intarsia.training import NoProgress, Parent, TrainConfig, start_or_resume, train


class Interrupting(NoProgress):
    """Sends this process SIGTERM when a step is done."""

    step: int | None = None

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        if done == Interrupting.step:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    jobs = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # Only the first process shows progress; in the others it is this that takes its place.
    start_or_resume.NoProgress = Interrupting  # type: ignore[misc]
    if len(jobs) > 1:  # A single run makes the process group itself, from torchrun's environment.
        dist.init_process_group("gloo")
    for job in jobs:
        print(json.dumps(report(job)), flush=True)
    if len(jobs) > 1:
        dist.destroy_process_group()


def report(job: dict[str, Any]) -> dict[str, Any]:
    """Do one run, and say how it went."""
    rank, directory = int(os.environ["RANK"]), Path(job["directory"])
    if job["copy_of"] is not None and rank == 0:
        shutil.copytree(job["copy_of"], directory)
    if dist.is_initialized():
        dist.barrier()
    Interrupting.step = (
        job["interrupt"][1] if job["interrupt"] is not None and job["interrupt"][0] == rank else None
    )
    try:
        result = train(
            ModelConfig.from_dict(job["model"]),
            TrainConfig.from_dict(job["train"]),
            TokenDataset(job["dataset"]),
            None,
            directory,
            device="cpu",
            parent=None if job["parent"] is None else Parent.parse(job["parent"]),
        )
    except IntarsiaError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"finished": result.finished, "step": result.step, "batches": result.batches}


if __name__ == "__main__":
    main()
