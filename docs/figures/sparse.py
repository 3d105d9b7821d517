"""The figure of docs/sparse.md: indexer, selector, attention, and what trains which.

    python docs/figures/sparse.py

writes `docs/figures/sparse.svg`.
"""

from __future__ import annotations

from pathlib import Path

from intarsia.files import write_text
from intarsia.ladder.report.markup import Markup, tag

FIGURE = Path(__file__).with_suffix(".svg")
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #6a5f54 }
.name { font-weight: 600; font-size: 14px; fill: #241d17 } .box { fill: #fffaf3; stroke: #c4622d; stroke-width: 1.2 }
.way { stroke: #c4622d; stroke-width: 1.4; fill: none } .tip { fill: #c4622d }
.learns .way { stroke: #1f6f8b; stroke-dasharray: 5 4 } .learns .tip, .learns text { fill: #1f6f8b }
@media (prefers-color-scheme: dark) {
  text { fill: #b3a697 } .name { fill: #efe7dc } .box { fill: #211b16; stroke: #f0915a } .way { stroke: #f0915a }
  .tip { fill: #f0915a } .learns .way { stroke: #5bb8d6 } .learns .tip, .learns text { fill: #5bb8d6 }
}
"""
WIDTH, TOP, WIDE, HIGH, GAP = 960.0, 64.0, 250.0, 92.0, 70.0
BOXES = (
    ("indexer", ("scores each token, or each few:", "some small heads, and one key for all")),
    ("selector", ("the best, of equal ones the earlier:", "numbers of tokens, pools or blocks")),
    ("attention", ("softmax over what was picked:", "nothing else is read")),
)
LABELS = ("scores", "numbers")


def figure() -> Markup:
    """Three boxes from left to right; above them what passes, below them what each loss trains."""
    parts: list[Markup] = []
    middle, bottom = TOP + HIGH / 2, TOP + HIGH
    for n, (name, says) in enumerate(BOXES):
        x = 35 + n * (WIDE + GAP)
        parts.append(tag("rect", x=x, y=TOP, width=WIDE, height=HIGH, rx=6, class_="box"))
        parts.append(text(name, x + 14, TOP + 26, "name"))
        parts += [text(line, x + 14, TOP + 50 + 17 * m) for m, line in enumerate(says)]
        if n:
            parts.append(across(x - GAP, x, middle))
            parts.append(text(LABELS[n - 1], x - GAP + 8, middle - 8))
    first, last = 35 + WIDE / 2, 35 + 2 * (WIDE + GAP) + WIDE / 2
    parts.append(text("the tokens of the past, and the one that asks", 35, 22))
    parts += [down(first, 30, TOP), down(last, 30, TOP)]
    parts.append(tag("path", d=f"M{first:g},30H{last:g}", class_="way"))
    below = bottom + 44
    learned = [
        tag("path", d=f"M{last - 60:g},{bottom:g}V{below:g}H{first:g}V{bottom + 7:g}", class_="way"),
        tip_up(first, bottom),
        text(
            "its loss: KL from attention's weights, summed over heads, to softmax of the scores",
            first + 14,
            below - 8,
        ),
        text(
            "in the warm-up over everything, all else frozen; then over what was picked",
            first + 14,
            below + 18,
        ),
    ]
    parts.append(tag("g", learned, class_="learns"))
    parts.append(down(last + 60, bottom, below))
    parts.append(text("the model's loss trains all but the indexer", last - 120, below + 18))
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {below + 34:g}",
        role="img",
        aria_label="An indexer scores, a selector picks, attention reads what was picked; the indexer learns from "
        "attention's weights, and the rest from the model's loss",
    )


def across(x: float, to: float, y: float) -> Markup:
    return tag(
        "g",
        tag("path", d=f"M{x:g},{y:g}H{to - 6:g}", class_="way"),
        tag("path", d=f"M{to - 7:g},{y - 4:g}L{to - 7:g},{y + 4:g}L{to - 1:g},{y:g}Z", class_="tip"),
    )


def down(x: float, top: float, bottom: float) -> Markup:
    return tag(
        "g",
        tag("path", d=f"M{x:g},{top:g}V{bottom - 6:g}", class_="way"),
        tag(
            "path",
            d=f"M{x - 4:g},{bottom - 7:g}L{x + 4:g},{bottom - 7:g}L{x:g},{bottom - 1:g}Z",
            class_="tip",
        ),
    )


def tip_up(x: float, y: float) -> Markup:
    return tag("path", d=f"M{x - 4:g},{y + 8:g}L{x + 4:g},{y + 8:g}L{x:g},{y + 2:g}Z", class_="tip")


def text(content: str, x: float, y: float, class_: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, class_=class_)


if __name__ == "__main__":
    write_text(FIGURE, figure() + "\n")
    print(f"{FIGURE} is written")
