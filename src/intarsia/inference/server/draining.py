"""How a server ends: what has begun comes to its end, unless it is told twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from intarsia.jobs.signals import handled


class DrainingServer(uvicorn.Server):
    """Ctrl-C or SIGTERM lets it take no client more, finish the answers that have begun, and return; a second one ends
    the process at once, as if nobody had handled it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle both while it serves. Uvicorn raises them once more when it has drained, and then an end in good order
        has the exit status of a process that was killed."""
        with handled(self.handle_exit, signal.SIGINT, signal.SIGTERM):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True
