"""What came of a ladder, on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from intarsia.ladder.ladder_results import Ascent


def show_ascent(console: Console, ascent: Ascent, report: Path) -> None:
    """A table of rungs, the sentence, and where the report is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("bits per byte", no_wrap=True)
    for arm in ascent.ladder.arms:
        table.add_column(arm, justify="right")
    for result in ascent.rungs:
        stopped = {decision.arm for decision in result.decisions if not decision.climbs}
        cells = []
        for arm in ascent.ladder.arms:
            level = result.level(arm)
            text = "–" if level is None else f"{level[0]:.3f}"
            cells.append(f"{text} stops" if arm in stopped else text)
        table.add_row(result.rung.name, *cells)
    console.print()
    console.print(table)
    sentence = Text(ascent.sentence, style="bold")
    console.print(Panel(sentence, title="Verdict", title_align="left", border_style="dim", expand=False))
    console.print("Laws, gates and what this ladder cannot show are in the report:")
    console.print(f"[bold]{report}[/]", highlight=False, soft_wrap=True)
