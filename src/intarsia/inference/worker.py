"""The engine on a thread of its own: requests come from other threads, and what becomes of them is told back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from intarsia.errors import IntarsiaError
from intarsia.inference.engine import Engine, Report
from intarsia.inference.requests import Ended, Event, Request

Tell = Callable[[Event], None]


class Ticket:
    """A request that has been handed in."""

    def __init__(self, request: Request, tell: Tell) -> None:
        self.request, self.tell = request, tell
        self.number: int | None = None
        self.open = request.count
        """How many of its answers have not ended."""


class Worker:
    """Lets an engine step as long as there is work. All but `turn` may be called from any thread; `turn` does one round
    of what the thread does, so that tests can do it by hand.

    Attributes:
        report: the engine's, as of the last round.
        failed: what ended the thread, if anything did.
        on_told: called after a round in which something was told, on the worker's thread: what `tell` gathered goes on
            its way together.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.report: Report = engine.report()
        self.failed: BaseException | None = None
        self.on_told: Callable[[], None] | None = None
        self._new: deque[Ticket] = deque()
        self._gone: deque[Ticket] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def open(self) -> int:
        """Requests that have not got all their answers."""
        return len(self._tickets) + len(self._new)

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread is not None and self._thread.is_alive() and self.failed is None

    def submit(self, request: Request, tell: Tell) -> Ticket:
        """Hand in a request. `tell` is called with its events, on the worker's thread: it must return soon.

        Raises:
            ConfigError: the engine cannot serve it.
            IntarsiaError: the worker has stopped.
        """
        self.engine.check(request)
        ticket = Ticket(request, tell)
        with self._wake:
            if self._stopping or self.failed is not None:
                raise IntarsiaError("the engine has stopped")
            self._new.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request; that it has ended is told as ever."""
        with self._wake:
            self._gone.append(ticket)
            self._wake.notify()

    def turn(self) -> bool:
        """Take what was handed in, let the engine do a step, and tell what came of it; whether there was anything."""
        with self._wake:
            new, self._new = self._new, deque()
            gone, self._gone = self._gone, deque()
            for ticket in new:
                ticket.number = self.engine.submit(ticket.request)
                self._tickets[ticket.number] = ticket
        events: list[Event] = []
        for ticket in gone:
            if ticket.number is not None and ticket.open:
                events += self.engine.cancel(ticket.number)
        worked = bool(new or gone or self.engine.has_work)
        if self.engine.has_work:
            events += self.engine.step()
        for event in events:
            self._tell(event)
        if events and self.on_told is not None:
            self.on_told()
        if worked:
            self.report = self.engine.report()
        return worked

    def start(self) -> None:
        """Begin to work, on a thread."""
        self._thread = threading.Thread(target=self._run, name="intarsia-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the work; what is not done is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                worked = self.turn()
                with self._wake:
                    if self._stopping:
                        break
                    if not worked and not self._new and not self._gone:
                        self._wake.wait()
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Tell those whose answers do not come any more."""
        with self._wake:
            self._stopping = True
            left, self._new = [*self._tickets.values(), *self._new], deque()
        reason = "cancelled" if self.failed is None else "error"
        error = None if self.failed is None else IntarsiaError(f"the engine has failed: {self.failed!r}")
        for ticket in left:
            for number in range(ticket.request.count):
                if ticket.open:
                    ended = Ended(-1, number, reason, len(ticket.request.prompt), 0, 0, error)  # type: ignore[arg-type]
                    ticket.open -= 1
                    ticket.tell(ended)
        self._tickets.clear()
        if left and self.on_told is not None:
            self.on_told()

    def _tell(self, event: Event) -> None:
        ticket = self._tickets[event.request]
        if isinstance(event, Ended):
            ticket.open -= 1
            if not ticket.open:
                del self._tickets[event.request]
        ticket.tell(event)
