"""Pages that a process asks the system for, with freed memory kept and not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from intarsia.jobs.freed_memory import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():  # as activations: several at a time, larger than what malloc keeps by itself
    return [torch.ones(2**24) for _ in range(3)]
for _ in range(8):  # until small pieces have found their places
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def pages(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's C library alone has mallopt")
def test_memory_is_asked_for_once() -> None:
    # Twelve tensors of 64 MiB, in pages of 4 KiB; of 2 MiB where the system makes them large by itself.
    plain, kept = pages("plain"), pages("kept")
    assert kept < 200
    assert plain > 4 * 3 * 2**26 / 2**21 - 50
    assert kept < plain
