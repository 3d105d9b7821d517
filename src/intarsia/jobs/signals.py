"""Ctrl-C and SIGTERM: as a polite request that is seen between two steps, or as one and the same interruption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """While this lasts, `handler` is called for these signals. Outside the main thread, where Python allows no signal
    handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def terminable() -> Iterator[None]:
    """While this lasts, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handled(interrupt, signal.SIGTERM):
        yield


class StopRequest:
    """While this context lasts, SIGINT and SIGTERM set `requested` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread the context does nothing.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        answer: str = "Stopping after this step and saving a checkpoint. Ctrl-C again stops at once.",
    ) -> None:
        self.requested = False
        self._tell, self._answer = tell, answer
        self._handled = ExitStack()

    def __enter__(self) -> StopRequest:
        self._handled.enter_context(handled(self._handle, signal.SIGINT, signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handled.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self._tell(self._answer)
