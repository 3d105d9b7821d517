"""What torch.compile needs on this machine, and what it says when it fails."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from intarsia.errors import ConfigError


def check_compiler(device: torch.device) -> None:
    """Make sure that there is something to compile with.

    Raises:
        ConfigError: there is not; the message says what to install.
    """
    missing = _missing_for_gpus() if device.type == "cuda" else _missing_for_cpus()
    if missing is not None:
        raise ConfigError(f"compile=true needs {missing}, or train without it (--no-compile)")


def _missing_for_gpus() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton to compile for GPUs, which is not installed: pip install triton"


def _missing_for_cpus() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler, and none is found: install g++ or clang++, or name one in the variable CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python, and Python.h is not found: install them (python3-dev)"
    return None


@contextmanager
def telling_what_cannot_be_compiled() -> Iterator[None]:
    """A block in which what torch.compile cannot do is told as an error of the configuration."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"a layer of this model cannot be compiled: {reason}. Train without it (--no-compile)"
        ) from error
