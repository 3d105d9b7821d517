"""The figure of docs/house.md: the floors, and the way of a batch in training and of a token in decoding through them.

    python docs/figures/house.py

writes `docs/figures/house.svg`. `tests/docs/test_house.py` holds the ways against the files that are really executed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from intarsia.files import write_text
from intarsia.ladder.report.markup import Markup, tag

FIGURE = Path(__file__).with_suffix(".svg")
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #6a5f54 }
.name { font-weight: 600; fill: #241d17 } .floor { font-weight: 600; font-size: 13px; fill: #241d17 }
.title { font-weight: 600; font-size: 14px; fill: #241d17 } .line { stroke: #e4dbcf }
.box { fill: #fffaf3; stroke: #c4622d; stroke-width: 1.2 } .way { stroke: #c4622d; stroke-width: 1.4; fill: none }
.tip { fill: #c4622d } .decode .box { stroke: #1f6f8b } .decode .way { stroke: #1f6f8b } .decode .tip { fill: #1f6f8b }
@media (prefers-color-scheme: dark) {
  text { fill: #b3a697 } .name, .floor, .title { fill: #efe7dc } .line { stroke: #3a322b }
  .box { fill: #211b16; stroke: #f0915a } .way { stroke: #f0915a } .tip { fill: #f0915a }
  .decode .box { stroke: #5bb8d6 } .decode .way { stroke: #5bb8d6 } .decode .tip { fill: #5bb8d6 }
}
"""
WIDTH, LEFT, COLUMN, GAP, HIGH, PITCH, TOP = 960.0, 256.0, 340.0, 16.0, 34.0, 46.0, 64.0


class Stop(NamedTuple):
    """A file on a way."""

    file: str
    """Below `src/intarsia`, or from the repository's root."""
    does: str


class Floor(NamedTuple):
    name: str
    says: tuple[str, ...]
    training: tuple[Stop, ...] = ()
    decoding: tuple[Stop, ...] = ()


FLOORS = (
    Floor(
        "cli",
        ("a verb per file: it reads options,", "calls the library, prints"),
        (Stop("cli/train.py", "options become settings"),),
        (Stop("cli/generate.py", "a prompt becomes tokens, tokens become text"),),
    ),
    Floor("ladder", ("plans, runs, the verdict, the report",)),
    Floor(
        "inference",
        ("decoding with explicit state, sampling",),
        (),
        (Stop("inference/generate.py", "all prompts in one packed row a step"),),
    ),
    Floor(
        "training",
        ("the loop, optimizers, checkpoints,", "distribution; asks data/ for batches"),
        (
            Stop("training/start_or_resume.py", "a new run, or one that goes on"),
            Stop("training/trainer.py", "steps until the budget is spent"),
            Stop("training/learner.py", "forward, backward, clip, update"),
        ),
    ),
    Floor("tasks", ("exams: examples from a seed, scores",)),
    Floor("data", ("corpora, tokenizers, packing",)),
    Floor("integrations", ("other libraries' interfaces",)),
    Floor("checkpoints", ("models on disk",)),
    Floor(
        "model",
        ("configuration, blocks, experts,", "the language model"),
        (
            Stop("model/language_model.py", "embedding, blocks, norm, loss"),
            Stop("model/block.py", "x += mixer(norm(x));  x += feed_forward(norm(x))"),
        ),
        (
            Stop("model/inference_model.py", "packed weights, the layers' steps"),
            Stop("model/few_tokens.py", "programs of what each token does alone"),
        ),
    ),
    Floor(
        "mixers",
        ("a token mixer in a file: its equation", "and the code of it"),
        (Stop("mixers/kda.py", "projections, convolution, rule, norm, gate, output"),),
    ),
    Floor(
        "layers",
        ("what layers are made of: norm, rope,", "convolution, gates, states, pools"),
        (),
        (Stop("layers/decoding.py", "what tokens exchange: the layer's step"),),
    ),
    Floor(
        "ops",
        ("the operators, and a table of what", "can compute each of them"),
        (
            Stop("ops/linear.py", "the call is checked; the fastest that serves it"),
            Stop("ops/linear_cpu.py", "a custom operator with its gradient"),
        ),
        (
            Stop("ops/decode.py", "few tokens of a layer, on states in slots"),
            Stop("ops/decode_cpu.py", "natively, past PyTorch's dispatcher"),
        ),
    ),
    Floor(
        "csrc",
        ("kernels for CPUs in C++, compiled for", "every instruction set"),
        (Stop("csrc/linear.cpp", "chunks of 64 tokens; heads on all cores"),),
        (Stop("csrc/decode.cpp", "each state is read once and written once"),),
    ),
)


def figure() -> Markup:
    """A band for each floor; in it what the two ways pass through, in their order."""
    parts: list[Markup] = [
        text("a batch in training", LEFT, 30, "title"),
        text("a token in decoding", LEFT + COLUMN + GAP, 30, "title"),
    ]
    y = TOP
    ways: dict[str, list[tuple[Stop, float]]] = {"training": [], "decoding": []}
    for floor in FLOORS:
        rows = max(1, len(floor.training), len(floor.decoding))
        parts.append(tag("line", x1=8, y1=y - 6, x2=WIDTH - 8, y2=y - 6, class_="line"))
        parts.append(text(floor.name, 14, y + 14, "floor"))
        parts += [text(line, 14, y + 14 + 15 * (n + 1)) for n, line in enumerate(floor.says)]
        for name, stops in (("training", floor.training), ("decoding", floor.decoding)):
            ways[name] += [(stop, y + PITCH * n) for n, stop in enumerate(stops)]
        y += PITCH * rows + 8
    for n, (name, stops) in enumerate(ways.items()):
        x = LEFT + n * (COLUMN + GAP)
        drawn = [arrow(x + 30, a[1] + HIGH, b[1]) for a, b in pairwise(stops)]
        drawn += [box(stop, x, top) for stop, top in stops]
        parts.append(tag("g", drawn, class_="decode" if name == "decoding" else None))
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {y + 4:g}",
        role="img",
        aria_label="The floors of the house, and the files that a batch in training and a token in decoding pass",
    )


def box(stop: Stop, x: float, y: float) -> Markup:
    return tag(
        "g",
        tag("rect", x=x, y=y, width=COLUMN - 10, height=HIGH, rx=5, class_="box"),
        text(stop.file, x + 10, y + 15, "name"),
        text(stop.does, x + 10, y + 29),
    )


def arrow(x: float, top: float, bottom: float) -> Markup:
    return tag(
        "g",
        tag("path", d=f"M{x:g},{top:g}V{bottom - 6:g}", class_="way"),
        tag(
            "path",
            d=f"M{x - 4:g},{bottom - 7:g}L{x + 4:g},{bottom - 7:g}L{x:g},{bottom - 1:g}Z",
            class_="tip",
        ),
    )


def text(content: str, x: float, y: float, class_: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, class_=class_)


if __name__ == "__main__":
    write_text(FIGURE, figure() + "\n")
    print(f"{FIGURE} is written")
