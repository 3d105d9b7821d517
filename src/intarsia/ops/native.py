"""The C++ kernels of `csrc/`: whether they are there, and for which instruction set of the processor.

The only place that imports the extension module, and not before somebody asks for it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

from intarsia.errors import ConfigError, UnsupportedError

MODULE = "intarsia.ops._native"
ISA_VARIABLE = "INTARSIA_CPU_ISA"
OFF = "off"


class _SwitchedOffError(ImportError):
    pass


@functools.cache
def _load() -> ModuleType | ImportError:
    if os.environ.get(ISA_VARIABLE) == OFF:
        return _SwitchedOffError()
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        return error


def is_switched_off() -> bool:
    """Whether the environment asks to do without the kernels."""
    return isinstance(_load(), _SwitchedOffError)


def missing_reason() -> str | None:
    """Why the kernels cannot be used and what to do about it, or None where they can."""
    found = _load()
    if isinstance(found, ModuleType):
        return None
    if isinstance(found, _SwitchedOffError):
        return f"the C++ kernels are switched off by {ISA_VARIABLE}={OFF} in the environment"
    if isinstance(found, ModuleNotFoundError) and found.name == MODULE:
        reason = "the C++ kernels were not compiled when Intarsia was installed"
    else:
        reason = f"the C++ kernels are there but do not load ({found})"
    return (
        f"{reason}; install it again with a C++20 compiler at hand and INTARSIA_NATIVE=required in the environment, "
        "which shows why a build fails (docs/install.md)"
    )


def native() -> ModuleType:
    """The extension module.

    Raises:
        UnsupportedError: it is not installed, or it does not load here.
    """
    found = _load()
    if isinstance(found, ModuleType):
        return found
    raise UnsupportedError(missing_reason()) from found


@functools.cache
def instruction_set() -> str:
    """The instruction set whose kernels are used: the best that this machine has, or the one that the environment
    variable INTARSIA_CPU_ISA names when this is first called. ("off" does without the kernels altogether.)

    Raises:
        ConfigError: the variable names one that this machine cannot run or that was not compiled.
        UnsupportedError: there are no kernels.
    """
    available: list[str] = native().available()
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return available[0]
    if forced not in available:
        raise ConfigError(f"{ISA_VARIABLE}={forced!r}: there are {', '.join(available)} here, and {OFF}")
    return forced


@functools.cache
def chunk_instruction_set() -> str:
    """The instruction set of the kernels that work on chunks of the linear operators, forward and backward.

    Raises:
        ConfigError, UnsupportedError: as `instruction_set`.
    """
    best = instruction_set()
    return best if os.environ.get(ISA_VARIABLE) else fastest_for_chunks(best, native().maker())


def fastest_for_chunks(best: str, maker: str) -> str:
    """Which instruction set multiplies chunks fastest on a processor of `maker` that has `best`: Intel's cores multiply
    pairs of bfloat16 at half the rate of float32, and what is gained does not pay for rounding and packing factors
    (16.6 against 11.9 ms, KDA, T = 2048, H = 8); AMD's at the same rate.

    By the maker and not by a measurement: the kernels round differently, and one machine should compute one thing.
    Products that read weights or keys once take as long as reading, whatever multiplies them.
    """
    return "avx512" if best == "avx512_bf16" and maker == "GenuineIntel" else best


@functools.cache
def warn_if_missing() -> None:
    """Tell the user, once a process, that the operators run without the kernels, unless that is what was asked for."""
    reason = missing_reason()
    if reason is not None and not is_switched_off():
        warnings.warn(f"the operators run in PyTorch, slower on a CPU: {reason}", stacklevel=2)
