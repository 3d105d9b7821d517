"""Checkpoints that are wholly there or not there at all, whichever process dies when, and that know when they are
damaged."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from intarsia.errors import CheckpointError
from intarsia.files import is_disk_full, message_of, publish_directory, write_json
from intarsia.training import checksums
from intarsia.training.distributed import Processes
from intarsia.training.optimizers import Optimizers
from intarsia.training.run_directory import read_json

_NAME = re.compile(r"step-(\d{6,})")
_TRAINER = "trainer.json"


class Checkpoints:
    """The checkpoints of a run, `step-000500/` each.

    Tensors (weights, optimizer state, random generators) are written by PyTorch's distributed checkpointing,
    every process its own part; any number of processes can read what any other number wrote. `trainer.json`
    beside them holds the rest, `checksums.json` the length and hash of every file. A checkpoint is written under a
    hidden name, brought to the disk, and renamed: a directory that has the final name is complete.

    Methods are called by all processes together, unless they say otherwise.

    Args:
        keep: how many of the newest are kept.
        keep_every: multiples of this are kept too.
        keep_step: and so is this one.
    """

    def __init__(
        self,
        directory: Path,
        processes: Processes,
        keep: int = 1,
        keep_every: int | None = None,
        keep_step: int | None = None,
    ) -> None:
        self.directory = directory
        self.processes = processes
        self.keep, self.keep_every, self.keep_step = keep, keep_every, keep_step

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
        return self.processes.first(lambda: found_steps(self.directory))

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, trainer: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those that are too old. Returns its path.

        Raises:
            CheckpointError: it cannot be written, for instance since the disk is full. What there was of it is
                removed, older checkpoints stay.
        """
        final = self.path(step)
        partial = self.directory / f".{final.name}"
        self.processes.first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        state = _tensors(model, optimizers) | {
            "random": {str(self.processes.rank): _generators(self.processes)}
        }
        try:
            with _quiet():
                dcp.save(state, checkpoint_id=partial, no_dist=self.processes.world_size == 1)
        except (Exception, CheckpointException) as error:
            raise self._not_written(final, partial, error, _local_bytes(state)) from error
        self.processes.first(lambda: None)  # `.metadata`, the first process' file, is there
        known = self._hash(partial)

        def complete() -> None:
            try:
                write_json(
                    partial / _TRAINER, {**trainer, "step": step, "world_size": self.processes.world_size}
                )
                checksums.write(partial, {**known, _TRAINER: checksums.Known.of(partial / _TRAINER)})
                publish_directory(partial, final)
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(self._failure(final, message_of(error))) from error

        self.processes.first(complete)
        self.processes.first(self._remove_old)
        return final

    def _hash(self, directory: Path) -> dict[str, checksums.Known]:
        """The checksums of all files, each process reading its share."""
        rank, size = self.processes.rank, self.processes.world_size
        share = {
            name: checksums.Known.of(directory / name) for name in checksums.names(directory)[rank::size]
        }
        known: dict[str, checksums.Known] = {}
        for part in self.processes.gather(share):
            known.update(part)  # type: ignore[call-overload]
        return known

    def _not_written(self, final: Path, partial: Path, error: BaseException, needed: int) -> CheckpointError:
        first = _first_failure(error)
        # PyTorch tells of a full disk in words of its own, and of other processes' errors without their cause.
        free = shutil.disk_usage(self.directory).free
        full = any(self.processes.gather(is_disk_full(first) or free < needed))
        if self.processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if full:
            reason = f"the disk is full: each process needs {_size(needed)}, and {_size(free)} were free in the end"
        else:
            reason = f"{type(first).__name__}: {message_of(first)}"
        return CheckpointError(self._failure(final, reason))

    def _failure(self, final: Path, reason: str) -> str:
        older = max(found_steps(self.directory), default=None)
        kept = "There is none before it" if older is None else f"The last one is kept: {self.path(older)}"
        advice = "Mend that, then give the same command again."
        return f"the checkpoint {final} could not be written: {reason}. {kept}. {advice}"

    def _remove_old(self) -> None:
        steps = found_steps(self.directory)
        for step in steps[: -self.keep]:
            if step == self.keep_step or (self.keep_every is not None and step % self.keep_every == 0):
                continue
            # Hidden first: a directory that is half removed must not look like a checkpoint.
            doomed = self.directory / f".{self.path(step).name}"
            os.rename(self.path(step), doomed)
            shutil.rmtree(doomed)

    def trainer(self, step: int) -> dict[str, Any]:
        """What was saved as `trainer` at `step`, after every file of the checkpoint was found to be what was written.

        Raises:
            CheckpointError: it is damaged. The message says how, and which older checkpoint is sound.
        """
        self.verify(step)
        return self.processes.first(lambda: read_json(self.path(step) / _TRAINER))

    def verify(self, step: int) -> None:
        """Compare every file of a checkpoint with its checksum, each process its share.

        Raises:
            CheckpointError: one differs. The message says what is wrong, and which older checkpoint is sound.
        """
        problems = self._problems(step)
        if not problems:
            return
        sound = next((s for s in reversed(self.steps()) if s < step and not self._problems(s)), None)
        path = self.path(step)
        if sound is None:
            advice = f"No older one is sound: take {path} from a copy, or start again in another directory."
        else:
            advice = f"That of step {sound} is sound: remove {path}, and the same command goes on from there."
        raise CheckpointError(f"the checkpoint {path} is damaged: {'; '.join(problems)}. {advice}")

    def _problems(self, step: int) -> list[str]:
        share = (self.processes.rank, self.processes.world_size)
        parts = self.processes.gather(checksums.problems(self.path(step), share))
        # A list that cannot be read is told by every process.
        return list(dict.fromkeys(problem for part in parts for problem in part))  # type: ignore[attr-defined]

    def load(self, step: int, model: nn.Module, optimizers: Optimizers, trainer: Mapping[str, Any]) -> None:
        """Read the tensors of `step` into the model, the optimizers' state and the random generators; `trainer` is what
        `trainer` gave. The optimizers' settings stay, since they come from the configuration.

        Raises:
            CheckpointError: it is of another model.
        """
        path = self.path(step)
        state = _tensors(model, optimizers)
        for part in state["optimizers"].values():
            _assert_tensors(part)
        # Generators belong to a process on a device; with others there is nothing to restore.
        same_processes = (trainer["world_size"], trainer["device"]) == (
            self.processes.world_size,
            self.processes.device.type,
        )
        if same_processes:
            state["random"] = {str(self.processes.rank): _generators(self.processes)}
        try:
            with _quiet():
                # Into the very tensors of the model and the optimizers: nothing has to be set afterwards.
                dcp.load(state, checkpoint_id=path, no_dist=self.processes.world_size == 1)
        except (Exception, CheckpointException) as error:
            first = _first_failure(error)
            raise CheckpointError(
                f"the checkpoint {path} does not fit the model: {type(first).__name__}: {first}"
            ) from error
        if same_processes:
            _restore_generators(state["random"][str(self.processes.rank)], self.processes)


def found_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    matches = [_NAME.fullmatch(entry.name) for entry in directory.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """The tensors themselves of the model and of the optimizers' state, not copies."""
    state = get_optimizer_state_dict(model, list(optimizers.members))["state"]
    return {"model": get_model_state_dict(model), "optimizers": {"state": state}}


def _assert_tensors(values: Any) -> None:
    """What is read in place must be tensors; a number would be read and lost."""
    for value in values.values() if isinstance(values, Mapping) else (values,):
        if isinstance(value, Mapping):
            _assert_tensors(value)
        else:
            assert isinstance(value, Tensor), f"optimizer state that is no tensor: {value!r}"


def _local_bytes(state: Any) -> int:
    """The bytes of all tensors of this process."""
    if isinstance(state, Mapping):
        return sum(map(_local_bytes, state.values()))
    if isinstance(state, DTensor):
        state = state.to_local()
    return state.nbytes if isinstance(state, Tensor) else 0


def _first_failure(error: BaseException) -> BaseException:
    """What went wrong. CheckpointException, which is no Exception, holds that of each process."""
    failures: Iterable[Any] = getattr(error, "failures", {}).values()
    return next((failure[0] for failure in failures), error)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


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
