"""How far one job is, as it is shown to a person: a small protocol, and two implementations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.text import Text


class Progress(Protocol):
    """Something that can show how far a job is. One job at a time; jobs may follow each other."""

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """A job of `total` steps begins, `done` of which were done before."""

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        """`done` steps of the job are done. `values`: what to show, such as `loss` and `tokens/s`."""

    def note(self, text: str) -> None:
        """Something to tell beside the bars: a line of its own."""

    def end(self) -> None:
        """The job is over, finished or not."""


class NoProgress:
    """Shows nothing."""

    def begin(self, label: str, total: int, done: int = 0) -> None: ...

    def advance(self, done: int, values: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


class RichProgress:
    """A bar on a terminal; on anything else (a file, a pipe) a plain line now and then.

    Used as a context manager. Finished jobs keep their bar on the screen.
    """

    seconds_between_lines = 10.0

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal
        self._bars = RichBars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Values(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.live,
        )
        self._task: TaskID | None = None
        self._label, self._total, self._first, self._began, self._printed = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._bars.stop()

    def begin(self, label: str, total: int, done: int = 0) -> None:
        self.end()
        self._label, self._total, self._first = label, total, done
        self._began = self._printed = time.monotonic()
        # A bar that was begun part-way must not count what was done before as speed.
        self._task = self._bars.add_task(label, total=total, completed=done, values="")

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        if self._task is None:
            return
        shown = format_values(values)
        self._bars.update(self._task, completed=done, values=shown)
        now = time.monotonic()
        if not self.live and (now - self._printed >= self.seconds_between_lines or done == self._total):
            self._printed = now
            left = (now - self._began) * (self._total - done) / max(done - self._first, 1)
            self.console.print(
                f"{self._label}: {done}/{self._total}  {shown}  {left:.0f} s left", highlight=False
            )

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def end(self) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
            self._task = None


class _Values(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("values", "")), style="cyan")


def format_values(values: Mapping[str, float]) -> str:
    """`loss 2.3456  tokens/s 12,345`: four figures behind the point for small numbers, none for large
    ones."""
    return "  ".join(
        f"{name} {value:,.0f}" if abs(value) >= 100 else f"{name} {value:.4f}"
        for name, value in values.items()
    )
