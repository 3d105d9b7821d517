"""What becomes of memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

# malloc.h: the parameters of `mallopt`.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3

LARGEST = 2**30
"""Bytes: what is larger is still given back."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, for what it asks for next.

    A step of training asks for the same gigabyte of activations and gradients as the step before. GNU's malloc gives
    large pieces back to the system and takes them again as pages that must be cleared and mapped one by one: 50,000 a
    step of a model of 180 M parameters, a seventh of its time (`benchmarks/training_peers.py`). The peak is the same;
    the memory is free for others when the process ends. To be called by programs whose process is theirs.

    Returns:
        Whether it will: GNU's C library alone can be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_parameter is None:
        return False
    return bool(set_parameter(_MMAP_THRESHOLD, LARGEST)) and bool(set_parameter(_TRIM_THRESHOLD, 2**31 - 1))
