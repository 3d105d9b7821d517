"""What a person sees while several jobs run side by side: a bar for each that is at work and one for the whole."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 15.0


@dataclass
class _Job:
    label: str
    total: int
    done: int = 0
    first: int = 0
    began: float = 0.0
    task: TaskID | None = None
    stage: str = "starting"
    loss: float | None = None
    speed: float | None = None


class Board:
    """Bars on a terminal; elsewhere (a file, a pipe) a line for each run and one now and then for the whole.

    Used as a context manager. Work is counted in training steps.
    """

    def __init__(self, console: Console, label: str, total_runs: int, total_steps: int) -> None:
        self.console = console
        self.live = console.is_terminal
        self._label, self._runs, self._steps = label, total_runs, total_steps
        self._finished, self._skipped_steps, self._done_steps = 0, 0, 0
        self._jobs: dict[str, _Job] = {}
        self._began = self._printed = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[cyan]{task.fields[values]}"),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            disable=not self.live,
            refresh_per_second=4,
        )
        self._whole = self._bars.add_task(
            f"[bold]{escape(label)}", total=max(total_steps, 1), values="", left=""
        )

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._jobs):
            self._remove(key)
        if kind is None:
            self._bars.update(self._whole, completed=max(self._steps, 1), left="")
        self._bars.stop()

    def expect(self, runs: int, steps: int) -> None:
        """There is less (or more) to do than was thought: so many runs and steps in all."""
        self._runs, self._steps = runs, steps
        self._bars.update(self._whole, total=max(steps, 1))

    def add(self, runs: int, steps: int) -> None:
        """There is so much more to do than was thought."""
        self.expect(self._runs + runs, self._steps + steps)

    def skip(self, steps: int) -> None:
        """A run was done before."""
        self._finished += 1
        self._skipped_steps += steps
        self._refresh()

    def start(self, key: str, label: str, total: int) -> None:
        """A run begins."""
        now = time.monotonic()
        task = self._bars.add_task(f"  {escape(label)}", total=total, values="starting", left="")
        self._jobs[key] = _Job(label, total, began=now, task=task)
        self._refresh()

    def resumed(self, key: str, done: int) -> None:
        """The run had done so many steps before."""
        job = self._jobs[key]
        job.done = job.first = done
        job.began, job.stage = time.monotonic(), "training"
        self._skipped_steps += done
        self._refresh()

    def step(self, key: str, done: int, loss: float | None, speed: float | None) -> None:
        """The run has done so many steps."""
        job = self._jobs[key]
        job.done, job.loss, job.speed, job.stage = done, loss, speed, "training"
        self._refresh()

    def stage(self, key: str, stage: str) -> None:
        """The run does something else now."""
        self._jobs[key].stage = stage
        self._refresh()

    def finish(self, key: str, result: str, good: bool = True) -> None:
        """The run has ended; `result` says how."""
        job = self._remove(key)
        self._done_steps += job.total - job.first
        self._finished += 1
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        count = f"[dim]{self._finished:>{len(str(self._runs))}}/{self._runs}[/]"
        self.console.print(
            f"{count} {mark} {escape(job.label)}  {escape(result)}", highlight=False, soft_wrap=True
        )
        self._refresh()

    def say(self, text: str) -> None:
        """A line beside the bars."""
        self.console.print(text, highlight=False)

    def _remove(self, key: str) -> _Job:
        job = self._jobs.pop(key)
        if job.task is not None:
            self._bars.remove_task(job.task)
        return job

    def _refresh(self) -> None:
        now = time.monotonic()
        fresh = self._done_steps + sum(job.done - job.first for job in self._jobs.values())
        done = self._skipped_steps + fresh
        left = (now - self._began) * (self._steps - done) / fresh if fresh else None
        whole = f"run {min(self._finished + 1, self._runs)} of {self._runs}"
        for job in self._jobs.values():
            if job.task is not None:
                steps = job.done - job.first
                rest = (now - job.began) * (job.total - job.done) / steps if steps else None
                self._bars.update(job.task, completed=job.done, values=_values(job), left=_left(rest))
        self._bars.update(self._whole, completed=done, values=whole, left=_left(left))
        if not self.live and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            running = "; ".join(
                f"{job.label}: {job.done}/{job.total} {_values(job)}" for job in self._jobs.values()
            )
            percent = done / max(self._steps, 1)
            self.console.print(
                f"{self._label}: {percent:.0%}, {_left(left) or 'starting'}  ({running})",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )


def _values(job: _Job) -> str:
    if job.stage != "training" or job.loss is None:
        return job.stage
    return (
        f"loss {job.loss:.3f}  {job.speed:,.0f} tokens/s" if job.speed is not None else f"loss {job.loss:.3f}"
    )


def _left(seconds: float | None) -> str:
    """`1:05 left`."""
    if seconds is None:
        return ""
    whole = max(int(seconds + 0.5), 0)
    hours, minutes = divmod(whole // 60, 60)
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{whole % 60:02} left"
