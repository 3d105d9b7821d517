"""The report of a ladder: what all rungs show together, and links to the report of each."""

from __future__ import annotations

from pathlib import Path

from intarsia.files import write_text
from intarsia.ladder.gates import GateDecision
from intarsia.ladder.ladder_results import Ascent, RungResult, rung_title
from intarsia.ladder.report import page
from intarsia.ladder.report.ladder_figures import (
    cost_section,
    law_section,
    multiplier_section,
    state_section,
)
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import names_legend
from intarsia.ladder.words import bracket
from intarsia.settings import toml


def write_ladder_report(path: Path, ascent: Ascent) -> None:
    """Write the report, atomically."""
    write_text(path, render_ladder(ascent))


def render_ladder(ascent: Ascent) -> str:
    """The report as HTML text."""
    return page(
        ascent.ladder.title,
        [
            _header(ascent),
            tag(
                "section",
                tag("p", ascent.sentence, class_="sentence"),
                class_="verdict",
                aria_label="Verdict",
            ),
            _rungs_section(ascent),
            law_section(ascent),
            multiplier_section(ascent),
            cost_section(ascent),
            state_section(ascent),
            _limits_section(ascent),
            _reproduce_section(ascent),
        ],
    )


def _header(ascent: Ascent) -> Markup:
    ladder = ascent.ladder
    seeds = len(ladder.rungs[0].plan.seeds)
    facts = [
        f"{len(ladder.arms)} architectures",
        f"{len(ladder.sizes)} sizes, {len(ascent.rungs)} of {len(ladder.rungs)} rungs climbed",
        f"{seeds} seed{'s' * (seeds > 1)}",
        f"baseline {ladder.baseline}",
    ]
    return tag(
        "header",
        tag("div", class_="inlay", aria_hidden="true"),
        tag("p", "Intarsia · ladder", class_="brand"),
        tag("h1", ladder.title),
        tag("ul", [tag("li", fact) for fact in facts], class_="meta"),
    )


def _rungs_section(ascent: Ascent) -> Markup:
    """A row for each rung, a column for each arm: bits per byte, and whether it climbed."""
    names = ascent.ladder.arms
    gates = ascent.ladder.gates
    rows = []
    for result in ascent.rungs:
        link = tag("a", "its report", href=f"rungs/{result.path.name}/report.html")
        head = tag(
            "td", result.rung.name, tag("span", rung_title(result).split(": ")[1], ", ", link, class_="note")
        )
        cells = [_cell(result, name) for name in names]
        rows.append(tag("tr", head, cells))
    rule = (
        f"An arm climbs only if it is shown to be worse than {ascent.ladder.baseline} by at most {gates.margin:g} "
        "bits per byte"
        if gates.strict
        else f"An arm stops where it is shown to be worse than {ascent.ladder.baseline} by more than "
        f"{gates.margin:g} bits per byte"
    )
    reasons = [
        tag("li", tag("strong", f"{decision.arm} {word(decision)} at {result.rung.name}. "), decision.reason)
        for result in ascent.rungs
        for decision in result.decisions
        if decision.arm != ascent.ladder.baseline or not decision.climbs
    ]
    left_out = f"Not climbed: {', '.join(ascent.not_climbed)}. {ascent.ended}" if ascent.not_climbed else None
    return tag(
        "section",
        tag("h2", "The rungs and their gates"),
        tag("p", f"{rule}. Held-out bits per byte; below, the difference to the baseline with its interval."),
        names_legend(names),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", tag("th", "Rung"), [tag("th", name) for name in names])),
                tag("tbody", rows),
                class_="cards",
            ),
            class_="scroll",
        ),
        tag("p", left_out) if left_out else None,
        tag(
            "details", tag("summary", "Why each arm climbed or stopped"), tag("ul", reasons, class_="limits")
        ),
    )


def word(decision: GateDecision) -> str:
    """What the gate did."""
    return "climbs" if decision.climbs else "stops"


def _cell(result: RungResult, name: str) -> Markup:
    decision = next((d for d in result.decisions if d.arm == name), None)
    if decision is None:
        return tag("td", "–", data_label=name, class_="gate")
    level = result.level(name)
    below = None
    if decision.difference is not None:
        interval = (
            "" if decision.low is None or decision.high is None else bracket(decision.low, decision.high)
        )
        sign = "−" if decision.difference < 0 else "+"
        mark = "" if decision.climbs else " · stops"
        below = f"{sign}{abs(decision.difference):.3f} {interval}{mark}"
    elif not decision.climbs:
        below = "stops"
    return tag(
        "td",
        "no run finished" if level is None else f"{level[0]:.3f}",
        tag("small", below, class_="below") if below else None,
        data_label=name,
        class_="gate" if decision.climbs else "gate stops",
    )


def _limits_section(ascent: Ascent) -> Markup:
    limits = [
        "A law is fitted to what was measured. What it says of larger models or longer training is a guess, and the "
        "bands do not cover that another law might hold there.",
        "Compute is counted as 6 FLOPs for a parameter and a token in laws and multipliers, the same for all arms; "
        "the figure of costs has each model's own count.",
        "An arm that stopped at a gate has no numbers above it. It might have caught up.",
    ]
    if len(ascent.rungs) > 1:
        limits.append(
            "Each rung's verdict may err as often as the plan allows; over all rungs together the chance is larger."
        )
    seen = dict.fromkeys([*limits, *(ascent.rungs[-1].verdict.caveats if ascent.rungs else ())])
    return tag(
        "section",
        tag("h2", "What this cannot show"),
        tag("ul", [tag("li", limit) for limit in seen], class_="limits"),
    )


def _reproduce_section(ascent: Ascent) -> Markup:
    return tag(
        "section",
        tag("h2", "Do it again"),
        tag(
            "p",
            "Save the plan below as ",
            tag("code", "plan.toml"),
            " (it also lies beside this report) and run:",
        ),
        tag("pre", "intarsia ladder plan.toml"),
        tag(
            "p",
            f"It took {ascent.seconds / 60:.1f} minutes here. Each rung's report names its runs, its machine and its "
            "versions; ",
            tag("code", "verdict.json"),
            " has all numbers of this page.",
        ),
        tag("details", tag("summary", "The plan"), tag("pre", toml.dumps(ascent.ladder.to_dict()))),
    )
