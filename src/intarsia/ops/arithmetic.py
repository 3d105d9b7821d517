"""What computes on a device: of this the last bits of the numbers depend."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import torch

from intarsia.ops import native
from intarsia.sources import digest

ON_GPUS = ("fla-core", "triton")
"""The libraries whose kernels `impl="auto"` takes on GPUs where they are installed."""


def arithmetic(device: torch.device | str = "cpu") -> dict[str, str]:
    """What computes on a device.

    Raises:
        ConfigError: INTARSIA_CPU_ISA names an instruction set that is not there.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return {"GPU": torch.cuda.get_device_name(device), **{name: _version(name) for name in ON_GPUS}}
    if device.type != "cpu":
        return {"device": device.type}
    found = {"kernels": "none", "PyTorch": torch.backends.cpu.get_cpu_capability()}
    if native.is_switched_off():
        found["kernels"] = native.OFF
    elif native.missing_reason() is None:
        file = Path(native.native().__file__ or "")
        found["kernels"] = f"{native.instruction_set()} {_file_hash(file, file.stat().st_mtime_ns)}"
        if native.chunk_instruction_set() != native.instruction_set():
            found["kernels of chunks"] = native.chunk_instruction_set()
    return found


@functools.lru_cache(maxsize=8)
def _file_hash(path: Path, changed: int) -> str:
    return digest(path.read_bytes())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
