"""The figure of docs/archaeology.md: the mixers in the order of their publication, by what their memory fades by.

    python docs/figures/archaeology.py

writes `docs/figures/archaeology.svg` from what each mixer tells of itself.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from intarsia.files import write_text
from intarsia.ladder.report.markup import Markup, tag
from intarsia.mixers import MixerConfig
from intarsia.mixers.registry import own_mixers

FIGURE = Path(__file__).with_suffix(".svg")
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #6a5f54 }
.name { font-weight: 600; fill: #241d17 } .middle { text-anchor: middle } .year { font-weight: 600 }
.grid { stroke: #e4dbcf } .band { fill: #6a5f54; opacity: 0.06 }
.additive { --c: #1f6f8b } .delta { --c: #c4622d } .softmax { --c: #7a5c3e } .convolution { --c: #5f7a3e }
.dot { fill: var(--c) } .trail { stroke: var(--c); stroke-width: 1.4; opacity: 0.35; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #b3a697 } .name { fill: #efe7dc } .grid { stroke: #3a322b } .band { fill: #efe7dc }
  .additive { --c: #5bb8d6 } .delta { --c: #f0915a } .softmax { --c: #c8a884 } .convolution { --c: #a3c478 }
}
"""
COLUMNS = ("none", "fixed", "head", "channel")
HEADS = (("nothing", "fades"), ("fixed", "a head"), ("chosen,", "a head"), ("chosen,", "a channel"))
FAMILIES = {
    "additive": "adds",
    "delta": "erases, then adds",
    "softmax": "keeps every token",
    "convolution": "keeps the last few",
}
LEFT, STEP, TOP, ROW, WIDTH = 52.0, 74.0, 84.0, 33.0, 930.0
TEXT = LEFT + 4 * STEP + 8
CHARACTERS = 74
"""So many fit behind a name."""


def published(config: type[MixerConfig]) -> tuple[int, str]:
    """What the rows are sorted by: the year, and in it the number that arXiv gives in order."""
    return config.about.year, config.about.source


def figure(configs: Sequence[type[MixerConfig]] | None = None) -> Markup:
    """A row a mixer (of this package by default), a column a kind of decay, a colour a family."""
    rows = sorted(own_mixers() if configs is None else configs, key=published)
    height = TOP + ROW * len(rows) + 12
    parts: list[Markup] = legend()
    for column, lines in enumerate(HEADS):
        x = LEFT + (column + 0.5) * STEP
        parts += [text(line, x, 46 + 15 * i, "middle") for i, line in enumerate(lines)]
        parts.append(tag("line", x1=x, y1=TOP - 14, x2=x, y2=height - 10, class_="grid"))
    places: dict[str, list[tuple[float, float]]] = {family: [] for family in FAMILIES}
    marks, year = [], None
    for i, config in enumerate(rows):
        about, y = config.about, TOP + (i + 0.5) * ROW
        if about.year != year:
            year = about.year
            marks.append(text(str(year), 14, y + 4, "year"))
            if year % 2 == 0:
                same = sum(other.about.year == year for other in rows)
                band = tag("rect", x=0, y=y - ROW / 2, width=WIDTH, height=ROW * same, class_="band")
                parts.append(band)
        x = LEFT + (COLUMNS.index(about.decay) + 0.5) * STEP
        places[about.family].append((x, y))
        dot = tag("circle", cx=x, cy=y, r=6, class_="dot")
        marks += [tag("g", dot, class_=about.family), text(config.type, TEXT, y + 4, "name")]
        lines = textwrap.wrap(about.brought, CHARACTERS)
        top = y + 4 - 7.5 * (len(lines) - 1)
        marks += [text(line, TEXT + 96, top + 15 * n) for n, line in enumerate(lines)]
    for family, points in places.items():
        if family != "softmax" and len(points) > 1:
            path = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
            parts.append(tag("g", tag("path", d=path, class_="trail"), class_=family))
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        parts,
        marks,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label="The mixers by year: what their memory fades by, and whether they erase",
    )


def legend() -> list[Markup]:
    parts, x = [], 14.0
    for family, label in FAMILIES.items():
        parts.append(tag("g", tag("circle", cx=x + 6, cy=16, r=6, class_="dot"), class_=family))
        parts.append(text(label, x + 18, 20))
        x += 40 + 6.6 * len(label)
    return parts


def text(content: str, x: float, y: float, css: str = "") -> Markup:
    return tag("text", content, x=x, y=y, class_=css)


if __name__ == "__main__":
    write_text(FIGURE, str(figure()) + "\n")
    print(f"wrote {FIGURE}")
