"""A lock keeps other processes out, and goes with the process that holds it."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.jobs.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from intarsia.jobs.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held_elsewhere(path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock for so long."""
    arguments = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    with held_elsewhere(path, 60) as other:
        with pytest.raises(ConfigError, match="it is busy"), locked(path, ConfigError("it is busy")):
            pass
        with pytest.raises(BlockingIOError, match="another process holds the lock"), locked(path):
            pass
        began = time.monotonic()
        with pytest.raises(ConfigError), locked(path, ConfigError("still"), seconds=0.3):
            pass
        assert 0.3 <= time.monotonic() - began < 10
        other.kill()
        other.wait()
        with locked(path) as held:
            assert held


@pytest.mark.parametrize("seconds", [60.0, math.inf])
def test_it_can_be_waited_for(tmp_path: Path, seconds: float) -> None:
    with (
        held_elsewhere(tmp_path / ".lock", 0.5) as other,
        locked(tmp_path / ".lock", seconds=seconds) as held,
    ):
        assert held
        assert other.wait(timeout=10) == 0


def test_errors_within_are_the_callers_own(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mine"), locked(tmp_path / ".lock", optional=True):
        raise UnsupportedError("mine")
    with locked(tmp_path / ".lock"):
        pass


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", optional=True) as held:
        assert not held
    with (
        pytest.raises(UnsupportedError, match="cannot be locked: its file system has no locks"),
        locked(tmp_path / ".lock"),
    ):
        pass
