"""The child's side: a process that a `Pool` started, tells its parent how far it is, and does not outlive it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from intarsia.jobs.locks import locked

DONE, CRASHED, FAILED, INTERRUPTED = 0, 1, 3, 4
"""Exit statuses: the work is done, went wrong, came to an end that is a result, was stopped from outside."""
PARENT = "INTARSIA_PARENT"
"""The environment variable that tells a child its parent's process id."""
SECONDS_FOR_PREDECESSOR = 60.0
"""A child whose parent was killed may still be saving its work when the next one comes: that one waits."""


class Channel:
    """Lines of JSON to the parent. A parent that has gone is no error: this process is told so otherwise.

    It has the face of `intarsia.jobs.progress.Progress`.
    """

    seconds_between_lines = 0.2

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._sent = 0.0

    def send(self, **values: Any) -> None:
        """Tell the parent something at once."""
        try:
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            pass

    def begin(self, label: str, total: int, done: int = 0) -> None:
        self.send(event="begin", total=total, done=done)

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._sent >= self.seconds_between_lines:
            self._sent = now
            self.send(event="step", done=done, loss=values.get("loss"), speed=values.get("tokens/s"))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        pass


@contextmanager
def child_process(lock: Path) -> Iterator[Channel]:
    """Be a child that works where `lock` is, alone, as long as its parent lives. Gives the channel to the parent.

    Raises:
        RuntimeError: another process works there still.
    """
    die_with_parent()
    channel = _open_channel()
    busy = RuntimeError(f"another process is still at work in {lock.parent}")
    with locked(lock, busy, seconds=SECONDS_FOR_PREDECESSOR):
        yield channel


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it dies (Linux; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    parent = os.environ.get(PARENT)
    if parent and os.getppid() != int(parent):
        sys.exit(INTERRUPTED)


def _open_channel() -> Channel:
    """Standard output for the parent alone; what others print goes where errors go."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Channel(stream)
