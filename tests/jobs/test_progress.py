"""Progress on a terminal and in a file."""

from __future__ import annotations

import io

from rich.console import Console

from intarsia.jobs.progress import NoProgress, Progress, RichProgress, format_values


def drive(progress: Progress, label: str, first: int = 0) -> None:
    progress.begin(label, 4, first)
    for done in range(first + 1, 5):
        progress.advance(done, {"loss": 2.34567, "tokens/s": 12345.6})
    progress.note("A word beside it.")
    progress.end()


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with RichProgress(console) as progress:
        drive(progress, "first")
        drive(progress, "second", 2)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_on_a_terminal():
    text = shown(terminal=True)
    for part in ("first", "second", "4/4", "loss 2.3457", "tokens/s 12,346", "A word beside it."):
        assert part in text


def test_in_a_file_there_are_plain_lines():
    lines = shown(terminal=False).splitlines()
    assert "first: 4/4  loss 2.3457  tokens/s 12,346  0 s left" in lines
    assert "A word beside it." in lines
    assert not any("\x1b" in line for line in lines)


def test_nothing_is_shown_by_default_and_nothing_breaks():
    drive(NoProgress(), "silent")
    progress = RichProgress(Console(file=io.StringIO()))
    progress.advance(1, {})  # Outside of a job.
    progress.end()


def test_values():
    assert format_values({"loss": 0.12345, "tokens/s": 99.5}) == "loss 0.1235  tokens/s 99.5000"
