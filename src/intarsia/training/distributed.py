"""The processes of a run: who am I, on which device, and what do we say together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from intarsia.errors import ConfigError, IntarsiaError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, as one of them sees them."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; every process gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def count(self, number: int) -> int:
        """The sum over all processes of a number of each. The host alone is asked, where the group can talk without
        GPUs: what they are at is not waited for."""
        if self.world_size == 1:
            return number
        device = torch.device("cpu") if "cpu:" in str(dist.get_backend_config()) else self.device
        total = torch.tensor(number, device=device)
        dist.all_reduce(total)
        return int(total)

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, value: object) -> list[object]:
        """One small picklable value of each process, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """What `action`, called in the first process alone, returns; small and picklable. An IntarsiaError or OSError
        that it raises there is raised in all processes alike."""
        value, problem = None, None
        if self.is_main:
            try:
                value = action()
            except (IntarsiaError, OSError) as error:
                problem = error
        value, problem = self.gather((value, problem))[0]  # type: ignore[misc]
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # or the error would hold this frame, and with it all that is above, in a circle
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone.

    A process group that exists already is used and left as it is. One that is made here (torchrun's
    environment variables say so) is taken down at the end.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". Under torchrun each process
            takes the GPU of its local rank.
    """
    made_here = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Both backends: gradients travel between GPUs, small facts between CPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_named(device).type == "cuda" else "gloo")
        made_here = True
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device_named(device))
        else:
            yield Processes(device=device_named(device))
    finally:
        if made_here:
            dist.destroy_process_group()


def shard(model: nn.Module, processes: Processes) -> None:
    """Divide parameters, gradients and optimizer state among the processes (FSDP2), block by block.

    Parameters become DTensors, in place; so this comes before the optimizer. A process alone keeps plain
    tensors. Mixed precision is left to autocast, which is the same with and without sharding: a
    `MixedPrecisionPolicy` would cast the parameters that must stay float32 as well.
    """
    if processes.world_size == 1:
        return
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def device_named(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        ConfigError: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"cannot train on {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device 'cuda' was asked for, and PyTorch sees no GPU: use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device
