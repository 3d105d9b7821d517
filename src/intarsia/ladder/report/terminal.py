"""A comparison on the terminal: what it is going to do; in the end two small tables, the sentence, a text, the path of
the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from intarsia.ladder.arms import ResolvedArm
from intarsia.ladder.capacity import Capacity
from intarsia.ladder.exam_trial import ExamTrial
from intarsia.ladder.plan import Plan
from intarsia.ladder.report.parts import context_name, exam_cell, percent, size_name
from intarsia.ladder.results import Results
from intarsia.ladder.text_trial import TextTrial
from intarsia.ladder.verdict import Verdict
from intarsia.ladder.words import bracket, count

MARKS = {"better": "[green]▲[/]", "worse": "[green]▲[/]", "equal": "=", "undecided": "≈", "unjudged": "?"}


def introduce(
    console: Console, plan: Plan, text: TextTrial | None, exams: Sequence[ExamTrial], capacity: Capacity
) -> None:
    """Say what is going to be compared, and what it is too little for."""
    console.print(f"[bold]{escape(plan.title or plan.name)}[/]", highlight=False)
    if text is not None:
        console.print(
            f"{text.dataset.corpus}: {count(text.dataset.train.tokens)} training tokens ({text.dataset.tokenizer}), "
            f"{len(text.documents.judged)} held-out documents to judge by",
            highlight=False,
        )
        _introduce_arms(console, text.arms)
    for exam in exams:
        task = exam.exam.made
        console.print(
            f"exam {exam.exam.name}: {task.title.lower()} of {task.length} tokens, "
            f"{exam.exam.steps} steps of {exam.exam.rows} examples at most",
            highlight=False,
            markup=False,
        )
    if text is None and exams:
        _introduce_arms(console, exams[0].arms)
    for warning in () if text is None else text.documents.warnings:
        console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
    threads = capacity.threads
    several = f"{capacity.jobs} runs at a time, {threads} thread{'s' * (threads > 1)} each"
    console.print(f"[dim]{several}. Ctrl-C stops; the same command goes on.[/]", highlight=False)


def _introduce_arms(console: Console, arms: Sequence[ResolvedArm]) -> None:
    for arm in arms:
        change = f"  ({arm.change})" if arm.change else ""
        console.print(
            f"  {arm.name:<16} {count(arm.non_embedding_parameters)} + "
            f"{count(arm.parameters - arm.non_embedding_parameters)} parameters  "
            f"{arm.config.layout}{change}",
            highlight=False,
            markup=False,
        )


def show_verdict(console: Console, results: Results, verdict: Verdict, report: Path) -> None:
    """Print what came out."""
    console.print()
    if results.arms:
        console.print(_quality(results, verdict))
    for table in (_costs(results), _exams(results)):
        if table is not None:
            console.print(table)
    console.print(_box(Text(verdict.sentence, style="bold"), "Verdict"))
    if len(verdict.pairs) > 1:
        grid = Table.grid(padding=(0, 1))
        for pair in verdict.pairs:
            grid.add_row(f" {MARKS[pair.outcome]}", Text(pair.sentence))
        console.print(grid)
    for note in verdict.notes:
        console.print(note, highlight=False, markup=False)
    _failures(console, results)
    sample = next((sample for sample in results.samples if sample.arm == verdict.lowest), None)
    if sample is not None:
        text = Text(sample.prompt, style="bold") + Text(sample.text.rstrip(), style="default")
        console.print(_box(text, f"{verdict.lowest}, the lowest, writes"))
    console.print("What this comparison cannot show is in the report:")
    console.print(f"[bold]{report}[/]", highlight=False, soft_wrap=True)


def _box(text: Text, title: str) -> Panel:
    return Panel(text, title=title, title_align="left", border_style="dim", expand=False)


def _failures(console: Console, results: Results) -> None:
    if not results.failed:
        return
    console.print(f"[red]{len(results.failed)} of {len(results.runs)} runs failed:[/]", highlight=False)
    for run in results.failed:
        if run.failure is not None:
            text = f"  {run.name} ({run.role}), {run.failure.kind}: {run.failure.message}"
            console.print(text, highlight=False, markup=False)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=name.startswith("bits"))
    return table


def _quality(results: Results, verdict: Verdict) -> Table:
    sure = percent(verdict.confidence)
    table = _table("model", "parameters + embeddings", "rate", f"bits per byte [{sure}]", "training tokens/s")
    for row in verdict.rows:
        level = row.estimate
        score = "no run finished"
        if level is not None:
            score = f"{level.value:.3f} {bracket(level.interval.low, level.interval.high)}"
        score_text = Text(score)
        if row.is_baseline:
            table.add_row(row.name, "", "", score_text, "", style="dim")
            continue
        arm = results.arm(row.name)
        speed = arm.measurements.training_tokens_per_second
        sizes = (
            f"{count(arm.non_embedding_parameters)} + {count(arm.parameters - arm.non_embedding_parameters)}"
        )
        rate = f"{arm.learning_rate:g}" if arm.learning_rate is not None else "–"
        style = "bold" if row.name == verdict.lowest else ""
        table.add_row(row.name, sizes, rate, score_text, f"{speed:,.0f}" if speed else "–", style=style)
    return table


def _exams(results: Results) -> Table | None:
    """Right answers in %, with the least and the most over seeds."""
    if not results.exams:
        return None
    names = [arm.name for arm in results.exams[0].arms]
    cells = [[exam_cell(exam.arm(name)) for name in names] for exam in results.exams]
    columns, rows = names, [exam.name for exam in results.exams]
    if len(columns) > max(3, len(rows)):  # as many do not fit beside each other in eighty columns
        columns, rows, cells = rows, columns, [list(each) for each in zip(*cells, strict=True)]
    table = _table("right answers in %", *columns)
    for row, each in zip(rows, cells, strict=True):
        table.add_row(row, *each)
    return table


def _costs(results: Results) -> Table | None:
    contexts = sorted({cost.context for arm in results.arms for cost in arm.measurements.decoding})
    if not contexts:
        return None
    table = _table("decoding after", *[f"{context_name(context)} tokens" for context in contexts])
    for arm in results.arms:
        costs = {cost.context: cost for cost in arm.measurements.decoding}
        cells = [
            f"{costs[c].milliseconds:.2f} ms\n{size_name(costs[c].cache_bytes)}" if c in costs else "–"
            for c in contexts
        ]
        table.add_row(arm.name, *cells)
    return table
