"""The README's figure and table, from the verdict of a comparison.

    make demo
    .venv/bin/python docs/figures/demo.py runs/demo

writes `docs/figures/demo.svg` and what stands between the `demo` marks of README.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.files import write_text
from intarsia.ladder.report.charts import Axis, log_ticks, ticks
from intarsia.ladder.report.markup import Markup, tag

ROOT = Path(__file__).resolve().parents[2]
FIGURE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT, TOP, BOTTOM = 920.0, 250.0, 56.0, 206.0
# The report's colours. A picture in a page has no style sheet but its own, so it brings one, for light and dark.
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #6a5f54 }
.title { font-weight: 600; font-size: 13px; fill: #241d17 } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #e4dbcf } .line { fill: none; stroke-width: 2.2 } .value { fill: #241d17 }
.arm-0 { --c: #7a5c3e } .arm-1 { --c: #c4622d } .arm-2 { --c: #1f6f8b } .arm-3 { --c: #6d4c92 } .other { --c: #9b8f82 }
.line, .bar { stroke: var(--c) } .bar { stroke-width: 2.2 } .dot, .name { fill: var(--c) } .name { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #b3a697 } .title, .value { fill: #efe7dc } .grid { stroke: #3a322b }
  .arm-0 { --c: #c8a884 } .arm-1 { --c: #f0915a } .arm-2 { --c: #5bb8d6 } .arm-3 { --c: #b798dc }
}
"""

Points = Sequence[tuple[float, float]]


def figure(verdict: dict[str, Any]) -> Markup:
    """Quality, cache and time per token, side by side."""
    curves = {
        quantity: {
            arm["name"]: [(row["context"], row[quantity]) for row in arm["measurements"]["decoding"]]
            for arm in verdict["arms"]
        }
        for quantity in ("cache_bytes", "milliseconds")
    }
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        quality(verdict, 0, 330),
        growth("Cache of one sequence", curves["cache_bytes"], 400, 640, byte_text, log=True),
        growth("Milliseconds per token", curves["milliseconds"], 680, 910, lambda v: f"{v:g}"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=verdict["sentence"],
    )


def quality(verdict: dict[str, Any], left: float, right: float) -> Markup:
    """Held-out bits per byte with their intervals; lower is better."""
    arms = [arm["name"] for arm in verdict["arms"]]
    rows = [row for row in verdict["rows"] if row["name"] in arms] + [
        row for row in verdict["rows"] if row["is_baseline"]
    ][-1:]
    intervals = [row["estimate"]["interval"] for row in rows]
    low, high = min(i["low"] for i in intervals), max(i["high"] for i in intervals)
    room = 0.06 * (high - low)
    x = Axis(low - room, high + room, left + 96, right)
    parts: list[Markup] = [
        tag("text", "Held-out bits per byte, lower is better", x=left, y=20, class_="title")
    ]
    for mark in ticks(x.low, x.high, 4):
        parts.append(tag("line", x1=x.at(mark), x2=x.at(mark), y1=TOP - 14, y2=BOTTOM, class_="grid"))
        parts.append(tag("text", f"{mark:g}", x=x.at(mark), y=BOTTOM + 18, class_="middle"))
    for index, row in enumerate(rows):
        y = TOP + 8 + (BOTTOM - TOP - 16) * index / max(len(rows) - 1, 1)
        css = f"arm-{arms.index(row['name'])}" if row["name"] in arms else "other"
        interval = row["estimate"]["interval"]
        parts += [
            tag("text", row["name"], x=left + 84, y=y + 4, class_=f"name end {css}"),
            tag("line", x1=x.at(interval["low"]), x2=x.at(interval["high"]), y1=y, y2=y, class_=f"bar {css}"),
            tag("circle", cx=x.at(row["estimate"]["value"]), cy=y, r=5.0, class_=f"dot {css}"),
        ]
    return tag("g", parts)


def growth(
    title: str,
    curves: Mapping[str, Points],
    left: float,
    right: float,
    text: Callable[[float], str],
    log: bool = False,
) -> Markup:
    """Lines against the context, which is on a logarithmic axis."""
    points = [point for curve in curves.values() for point in curve]
    contexts = sorted({context for context, _ in points})
    values = [value for _, value in points]
    low, high = (min(values) / 1.3, max(values) * 1.3) if log else (0.0, max(values) * 1.08)
    x, y = Axis(contexts[0], contexts[-1], left + 8, right - 8, True), Axis(low, high, BOTTOM, TOP - 14, log)
    parts: list[Markup] = [tag("text", title, x=left - 36, y=20, class_="title")]
    for mark in log_ticks(low, high, 5) if log else ticks(low, high, 4):
        parts.append(tag("line", x1=left, x2=right, y1=y.at(mark), y2=y.at(mark), class_="grid"))
        parts.append(tag("text", text(mark), x=left - 6, y=y.at(mark) + 4, class_="end"))
    for context in contexts:
        parts.append(tag("text", context_text(context), x=x.at(context), y=BOTTOM + 18, class_="middle"))
    parts.append(tag("text", "tokens of context", x=(left + right) / 2, y=BOTTOM + 36, class_="middle"))
    for index, curve in enumerate(curves.values()):
        path = "M" + "L".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in curve)
        parts.append(tag("path", d=path, class_=f"line arm-{index}"))
        parts += [tag("circle", cx=x.at(a), cy=y.at(b), r=3.0, class_=f"dot arm-{index}") for a, b in curve]
    return tag("g", parts)


def table(verdict: dict[str, Any]) -> str:
    """The arms as a Markdown table, the verdict below it."""
    estimates = {row["name"]: row["estimate"] for row in verdict["rows"]}
    longest = max(row["context"] for arm in verdict["arms"] for row in arm["measurements"]["decoding"])
    at = f"at {context_text(longest)} tokens"
    lines = [
        f"| model | layers | parameters | bits per byte (95 %) | training tokens/s | cache {at} | ms/token {at} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in verdict["arms"]:
        measured = arm["measurements"]
        last = next(row for row in measured["decoding"] if row["context"] == longest)
        lines.append(
            row_of(
                f"`{arm['name']}`",
                " ".join(arm["layout"].split()),
                f"{arm['parameters'] / 1e6:.2f} M",
                interval_text(estimates[arm["name"]]),
                f"{measured['training_tokens_per_second']:,.0f}",
                byte_text(last["cache_bytes"]),
                f"{last['milliseconds']:.1f}",
            )
        )
    for row in verdict["rows"]:
        if row["is_baseline"]:
            lines.append(row_of(row["name"], row["note"], "", interval_text(row["estimate"]), "", "", ""))
    environment = verdict["environment"]
    settings = ", ".join(
        [
            f"{verdict['tokens_per_run']:,} training tokens a run",
            f"{len(verdict['plan']['seeds'])} seeds",
            f"{verdict['documents']} held-out documents of {verdict['corpus']}",
            f"{verdict['seconds'] / 60:.1f} minutes in all",
            environment["processor"],
            f"{environment['jobs']} runs at a time with {environment['threads']} thread each",
        ]
    )
    return "\n".join([*lines, "", f"> {verdict['sentence']}", "", f"{settings}."])


def row_of(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def interval_text(estimate: dict[str, Any]) -> str:
    interval = estimate["interval"]
    return f"{estimate['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def byte_text(number: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g} B"


def context_text(tokens: float) -> str:
    return f"{tokens / 1024:g} k" if tokens >= 1024 else f"{tokens:g}"


def main(arguments: Iterable[str]) -> None:
    directory = Path(next(iter(arguments), "runs/demo"))
    verdict = json.loads((directory / "verdict.json").read_text(encoding="utf-8"))
    write_text(FIGURE, str(figure(verdict)) + "\n")
    readme = ROOT / "README.md"
    image = f"![{verdict['sentence']}](docs/figures/{FIGURE.name})"
    block = f"<!-- demo: written by docs/figures/demo.py -->\n{image}\n\n{table(verdict)}\n<!-- /demo -->"
    text, found = re.subn(
        r"<!-- demo:.*?<!-- /demo -->", lambda _: block, readme.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if not found:
        sys.exit("README.md has no <!-- demo: ... --> and <!-- /demo --> to write between")
    write_text(readme, text)
    print(f"wrote {FIGURE} and the table of {readme}")


if __name__ == "__main__":
    main(sys.argv[1:])
