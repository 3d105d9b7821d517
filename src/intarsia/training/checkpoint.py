"""Checkpoints that are wholly there or not there at all, whichever process dies when."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from intarsia.errors import CheckpointError
from intarsia.files import flush, write_json
from intarsia.training.distributed import Processes
from intarsia.training.optimizers import Optimizers
from intarsia.training.run_directory import read_json

_NAME = re.compile(r"step-(\d{6,})")
_TRAINER = "trainer.json"


class Checkpoints:
    """The checkpoints of a run, `step-000500/` each.

    Tensors (weights, optimizer state, random generators) are written by PyTorch's distributed checkpointing,
    every process its own part; any number of processes can read what any other number wrote. `trainer.json`
    beside them holds the rest. A checkpoint is written under a hidden name, brought to the disk, and renamed:
    a directory that has the final name is complete.

    Methods are called by all processes together.
    """

    def __init__(self, directory: Path, keep: int, processes: Processes) -> None:
        self.directory = directory
        self.keep = keep
        self.processes = processes

    def remove_leftovers(self) -> None:
        """Remove what processes left that died while they wrote. Not while another process may be writing."""
        if self.processes.is_main and self.directory.exists():
            for leftover in self.directory.glob(".step-*"):
                shutil.rmtree(leftover)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; as process 0 sees them."""
        found = []
        if self.processes.is_main and self.directory.exists():
            matches = [_NAME.fullmatch(entry.name) for entry in self.directory.iterdir()]
            found = sorted(int(match[1]) for match in matches if match)
        steps = self.processes.gather(found)[0]
        assert isinstance(steps, list)
        return steps

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, trainer: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those that are too old. Returns its path."""
        final = self.path(step)
        partial = self.directory / f".{final.name}"
        self.directory.mkdir(parents=True, exist_ok=True)
        state = _tensors(model, optimizers) | {
            "random": {str(self.processes.rank): _generators(self.processes)}
        }
        with _quiet():
            dcp.save(state, checkpoint_id=partial, no_dist=self.processes.world_size == 1)
        if self.processes.is_main:
            write_json(partial / _TRAINER, {**trainer, "step": step, "world_size": self.processes.world_size})
            flush(partial)
            os.rename(partial, final)
            flush(self.directory)
        self.processes.barrier()
        old = self.steps()[: -self.keep]
        if self.processes.is_main:
            for step in old:
                # Hidden first: a directory that is half removed must not look like a checkpoint.
                doomed = self.directory / f".{self.path(step).name}"
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)
        return final

    def load(self, step: int, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Read the checkpoint of `step` into the model, the optimizers and the random generators.

        Returns:
            What was saved as `trainer`.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        path = self.path(step)
        trainer = read_json(path / _TRAINER)
        state = _tensors(model, optimizers)
        # Generators belong to a process; with another number of processes there is nothing to restore.
        same_processes = trainer["world_size"] == self.processes.world_size
        if same_processes:
            state["random"] = {str(self.processes.rank): _generators(self.processes)}
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=path, no_dist=self.processes.world_size == 1)
        except (Exception, CheckpointException) as error:
            # Damage shows in many ways: a missing file, a bad archive, a wrong shape. CheckpointException is no
            # Exception and holds what went wrong in each process.
            failures = getattr(error, "failures", {})
            first = next(iter(failures.values()))[0] if failures else error
            raise CheckpointError(
                f"cannot load {path}: {type(first).__name__}: {first}\n"
                "If it is damaged, remove that directory to go on from an older one."
            ) from error
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, list(optimizers.members), state["optimizers"])
        if same_processes:
            _restore_generators(state["random"][str(self.processes.rank)], self.processes)
        return trainer


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizers": get_optimizer_state_dict(model, list(optimizers.members)),
    }


def _generators(processes: Processes) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(processes.device)
    return states


def _restore_generators(states: Mapping[str, Tensor], processes: Processes) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], processes.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one process, which `no_dist=True` has already said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
