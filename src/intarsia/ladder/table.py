"""The end of a comparison on the terminal: two small tables, the sentence, a text, the path of the report."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from intarsia.ladder.plan import Plan
from intarsia.ladder.report.parts import context_name, size_name
from intarsia.ladder.results import Results
from intarsia.ladder.verdict import Verdict, bracket, count


def show_verdict(console: Console, plan: Plan, results: Results, verdict: Verdict, report: Path) -> None:
    """Print what came out."""
    console.print()
    console.print(_quality(results, verdict))
    costs = _costs(results)
    if costs is not None:
        console.print(costs)
    console.print(
        Panel(Text(verdict.sentence), title="Verdict", title_align="left", border_style="bold", expand=False)
    )
    if len(verdict.pairs) > 1:
        for pair in verdict.pairs:
            console.print(f"  [dim]·[/] {escape(pair.sentence)}", highlight=False)
    if results.failed:
        console.print(f"[red]{len(results.failed)} of {len(results.runs)} runs failed:[/]")
        for run in results.failed:
            if run.failure is not None:
                console.print(
                    f"  {run.name} ({run.role}), {run.failure.kind}: {escape(run.failure.message)}",
                    highlight=False,
                )
    sample = next((sample for sample in results.samples if sample.arm == verdict.best), None)
    if sample is not None:
        text = Text(sample.prompt, style="bold") + Text(sample.text, style="default")
        console.print(
            Panel(text, title=f"{verdict.best} writes", title_align="left", border_style="dim", expand=False)
        )
    console.print(f"What this cannot show is in the report: {report}", highlight=False, soft_wrap=True)


def _quality(results: Results, verdict: Verdict) -> Table:
    percent = f"{verdict.confidence:.0%}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in (
        "parameters",
        "+ embeddings",
        "learning rate",
        "held-out bits/byte",
        percent,
        "training tokens/s",
    ):
        table.add_column(name, justify="right")
    for row in verdict.rows:
        level = row.estimate
        score = f"{level.value:.4f}" if level else "no run finished"
        interval = bracket(level.interval.low, level.interval.high) if level else ""
        if row.is_baseline:
            table.add_row(f"[italic]{row.name}[/]", "", "", "", score, interval, "", style="dim")
            continue
        arm = results.arm(row.name)
        speed = arm.measurements.training_tokens_per_second
        table.add_row(
            row.name,
            count(arm.non_embedding_parameters),
            count(arm.parameters - arm.non_embedding_parameters),
            f"{arm.learning_rate:g}" if arm.learning_rate is not None else "–",
            score,
            interval,
            f"{speed:,.0f}" if speed else "–",
            style="bold" if row.name == verdict.best else "",
        )
    return table


def _costs(results: Results) -> Table | None:
    contexts = sorted({cost.context for arm in results.arms for cost in arm.measurements.decoding})
    if not contexts:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("decoding after")
    for context in contexts:
        table.add_column(f"{context_name(context)} tokens", justify="right")
    for arm in results.arms:
        costs = {cost.context: cost for cost in arm.measurements.decoding}
        cells = [
            f"{costs[c].milliseconds:.2f} ms  {size_name(costs[c].cache_bytes):>8}" if c in costs else "–"
            for c in contexts
        ]
        table.add_row(arm.name, *cells)
    return table
