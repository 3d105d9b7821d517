"""The figure of docs/kernels.md: how the kernels take a chunk of tokens apart.

python docs/figures/kernels.py

writes `docs/figures/kernels.svg`.
"""

from __future__ import annotations

from pathlib import Path

from intarsia.files import write_text
from intarsia.ladder.report.markup import Markup, tag

FIGURE = Path(__file__).with_suffix(".svg")
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #6a5f54 }
.title { font-weight: 600; font-size: 13px; fill: #241d17 } .middle { text-anchor: middle } .ink { fill: #241d17 }
.grid { stroke: #d9cfc2; fill: none } .axis { stroke: #6a5f54; stroke-width: 1.2; fill: none }
.pairs { fill: #c4622d } .product { fill: #1f6f8b } .state { fill: #7a5c3e } .bar { stroke-width: 5; fill: none }
.from-key { stroke: #c4622d } .whole { stroke: #1f6f8b } .to-row { stroke: #6d4c92 }
.key-text { fill: #c4622d } .whole-text { fill: #1f6f8b } .row-text { fill: #6d4c92 }
.box { fill: none; stroke: #b3a697 } .inverse { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #b3a697 } .title, .ink { fill: #efe7dc } .grid { stroke: #4a4038 } .axis { stroke: #b3a697 }
  .pairs { fill: #f0915a } .product { fill: #5bb8d6 } .state { fill: #c8a884 } .box { stroke: #6a5f54 }
  .from-key { stroke: #f0915a } .whole { stroke: #5bb8d6 } .to-row { stroke: #b798dc }
  .key-text { fill: #f0915a } .whole-text { fill: #5bb8d6 } .row-text { fill: #b798dc } .inverse { fill: #1b1613 }
}
"""
CELL = 44.0


def text(content: str, x: float, y: float, css: str = "") -> Markup:
    return tag("text", content, x=x, y=y, class_=css)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def scores(left: float, top: float) -> Markup:
    """Which products between the tokens of a chunk are taken how."""
    parts = [text("Products between 64 tokens", left, 20, "title")]
    for row in range(4):
        for column in range(row + 1):
            x, y = left + column * CELL, top + row * CELL
            if column < row:
                parts.append(tag("rect", x=x, y=y, width=CELL, height=CELL, class_="product", opacity=0.75))
            else:
                corner = f"M{x:g},{y:g}L{x:g},{y + CELL:g}L{x + CELL:g},{y + CELL:g}Z"
                parts.append(tag("path", d=corner, class_="pairs"))
    for edge in range(5):
        at = edge * CELL
        parts.append(line(left, top + at, left + 4 * CELL, top + at, "grid"))
        parts.append(line(left + at, top, left + at, top + 4 * CELL, "grid"))
    below = top + 4 * CELL
    parts += [
        text("j, the key's token →", left + 2 * CELL, below + 16, "middle"),
        tag("rect", x=left, y=below + 30, width=11, height=11, class_="pairs"),
        text("in a block of 16: pair by pair", left + 18, below + 40),
        tag("rect", x=left, y=below + 48, width=11, height=11, class_="product"),
        text("between blocks: one product", left + 18, below + 58),
    ]
    return tag("g", parts)


def decay(left: float, right: float) -> Markup:
    """The decay between two tokens, as three factors."""
    y, blocks = 98.0, 4
    width = (right - left) / blocks
    parts = [text("The decay from token j to token i", left, 20, "title"), line(left, y, right, y, "axis")]
    for edge in range(blocks + 1):
        parts.append(line(left + edge * width, y - 7, left + edge * width, y + 7, "axis"))
    j, i = left + 0.45 * width, left + 3.6 * width
    first, last = left + width, left + 3 * width
    parts += [
        line(j, y, first, y, "bar from-key"),
        line(first, y, last, y, "bar whole"),
        line(last, y, i, y, "bar to-row"),
        text("j", j, y - 12, "middle ink"),
        text("i", i, y - 12, "middle ink"),
        text("key: to the end of its block", left, y + 40, "key-text"),
        text("the blocks between, each as a whole", left, y + 60, "whole-text"),
        text("query: from the start of its block", left, y + 80, "row-text"),
        text("Each factor is a product of exp(g), so it lies in", left, y + 112),
        text("[0, 1]. No logarithms are subtracted: nothing", left, y + 129),
        text("overflows, and exp(−∞) = 0 is a factor like any", left, y + 146),
        text("other. A query's side knows no later token.", left, y + 163),
    ]
    return tag("g", parts)


def step(left: float, right: float) -> Markup:
    """What a chunk does with the state."""
    middle = (left + right) / 2
    parts = [text("One chunk after the other", left, 20, "title")]
    rows = [
        ("state", "S   [K, V], float32"),
        ("", "read:   q_start S  and  k_start S"),
        ("", "errors:   z = v − k_start S − kk βz,  16 rows at a time"),
        ("", "outputs:   o = q_start S + qk βz"),
        ("", "write:   S ← total S + k_endᵀ βz"),
        ("state", "S   for the next chunk"),
    ]
    y = 44.0
    for css, label in rows:
        box = "state" if css else "box"
        parts.append(tag("rect", x=left, y=y, width=right - left, height=28, rx=4, class_=box))
        parts.append(text(label, middle, y + 18, "middle inverse" if css else "middle ink"))
        if y > 44:
            parts.append(line(middle, y - 10, middle, y, "axis"))
        y += 38
    return tag("g", parts)


def figure() -> Markup:
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        scores(20, 44),
        decay(262, 548),
        step(590, 910),
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 930 300",
        role="img",
        aria_label="A chunk of 64 tokens: products between tokens, the decay between two of them, and what happens to"
        " the state",
    )


if __name__ == "__main__":
    write_text(FIGURE, str(figure()) + "\n")
    print(f"wrote {FIGURE}")
