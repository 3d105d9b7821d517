"""Our own code in a process of its own, where the environment or the number of threads must differ."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Worker, stopwatch
from delta_rule import forward, inputs, ours
from intarsia.errors import ConfigError, UnsupportedError


@contextmanager
def our_worker(environment: dict[str, str], **task: Any) -> Iterator[tuple[Worker, Tensor]]:
    """A worker for `serve`, and what it returns."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "output")
        command = [
            sys.executable,
            str(Path(__file__).parent),
            "--serve",
            json.dumps({**task, "output": str(output)}),
        ]
        with Worker(command, {"OMP_NUM_THREADS": str(task["threads"]), **environment}) as worker:
            yield worker, torch.load(output)


def serve(task: dict[str, Any]) -> None:
    """Be the worker: run once, say so, and answer each line with the seconds of a run."""
    torch.set_num_threads(task["threads"])
    x = inputs(task["length"], task["decay"], getattr(torch, task["dtype"]), task["heads"])
    call = ours(task["impl"])
    try:
        torch.save(forward(call, x), task["output"])
    except (ConfigError, UnsupportedError) as error:  # no such instruction set here, or no kernels
        print(error, flush=True)
        return
    print("ready", flush=True)
    timer = stopwatch(forward, call, x)
    for _ in sys.stdin:
        print(timer(), flush=True)
