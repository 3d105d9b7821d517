"""How long the threads that compute wait for each other awake."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "10000"
"""Some tenths of a millisecond: longer than what is done between two operations of a model. The default is thirty times
that, in which another program on the same cores could run (`benchmarks/busy.py`)."""


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Have GNU's OpenMP, on which PyTorch's operators run, give up its core sooner. It reads the environment when torch
    is imported. Who has said how threads should wait is not contradicted."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
