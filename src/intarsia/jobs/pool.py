"""The parent's side: child processes, a few at a time, that cannot take the parent with them and do not outlive it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from intarsia.jobs.child import PARENT

Event = Mapping[str, Any]


class Workers(Protocol):
    """What starts runs and tells what becomes of them: children of this process (`Pool`), or those of other machines
    (`intarsia.jobs.ray_cluster`)."""

    @property
    def busy(self) -> bool:
        """Whether any of them is at work."""
        ...

    def start(self, key: str, module: str, argument: Path, log: Path, threads: int) -> None: ...

    def wait(self, seconds: float) -> tuple[str, Event | int] | None: ...

    def stop(self) -> None: ...


class Machines(Protocol):
    """Where runs are made, if not on this machine."""

    @property
    def cores(self) -> int:
        """All together."""
        ...

    @property
    def widest(self) -> int:
        """Cores of the machine that has most."""
        ...

    def jobs(self, runs: int, bytes_of_run: int) -> int:
        """How many of so many runs fit at a time, each with so much memory."""
        ...

    def workers(self) -> Workers: ...


Events = queue.SimpleQueue[tuple[str, Event | int]]
"""What runs said, or their exit status, each with the run's key."""


def next_event(events: Events, running: dict[str, Any], seconds: float) -> tuple[str, Event | int] | None:
    """The next one; None if nothing happens in time. A run that has ended is no longer `running`."""
    try:
        key, event = events.get(timeout=seconds)
    except queue.Empty:
        return None
    if isinstance(event, int):
        del running[key]
    return key, event


@dataclass(frozen=True)
class Child:
    """A process that runs."""

    key: str
    process: subprocess.Popen[str]
    log: Path


@dataclass
class Pool:
    """Starts children, hands on what they say, and stops them all.

    Children are in sessions of their own, so that Ctrl-C in the terminal reaches the parent alone, which then
    asks each child once to save and end.
    """

    grace: float = 60.0
    """Seconds that a child has to save its checkpoint when it is asked to stop."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the children beside this process's own."""
    children: dict[str, Child] = field(default_factory=dict)
    _events: Events = field(default_factory=queue.SimpleQueue)

    @property
    def busy(self) -> bool:
        """Whether any child is left."""
        return bool(self.children)

    def start(self, key: str, module: str, argument: Path, log: Path, threads: int) -> None:
        """Start `python -m MODULE ARGUMENT`. What it prints is appended to `log`."""
        environment = {
            **os.environ,
            **self.environment,
            PARENT: str(os.getpid()),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
        }
        # A child trains alone, also where the parent was started by torchrun.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(argument)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        child = Child(key, process, log)
        self.children[key] = child
        threading.Thread(target=self._listen, args=(child,), daemon=True).start()

    def _listen(self, child: Child) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                self._events.put((child.key, event))
        self._events.put((child.key, child.process.wait()))

    def wait(self, seconds: float) -> tuple[str, Event | int] | None:
        """The next event: what a child said, or its exit status; None if nothing happens in time."""
        return next_event(self._events, self.children, seconds)

    def stop(self, report: Callable[[str, Event | int], None] = lambda key, event: None) -> None:
        """Ask every child to save and end; kill those that have not after the time of grace.

        A second Ctrl-C kills at once.
        """
        deadline = time.monotonic() + self.grace
        try:
            _signal(self.children.values(), signal.SIGTERM)
            while self.children and time.monotonic() < deadline:
                if happened := self.wait(0.2):
                    report(*happened)
        except KeyboardInterrupt:
            pass
        finally:
            _signal(self.children.values(), signal.SIGKILL)
            for child in self.children.values():
                child.process.wait()
            self.children.clear()


def _signal(children: Iterable[Child], number: signal.Signals) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(number)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    hint = ": perhaps the system ran out of memory (fewer jobs at a time need less)" if -status == 9 else ""
    return f"was ended by signal {-status} ({name}){hint}"
