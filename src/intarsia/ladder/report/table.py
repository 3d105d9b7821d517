"""The table of models: sizes, bits per byte, speed, and what decoding costs."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ladder.plan import Plan
from intarsia.ladder.report.charts import layout_strip
from intarsia.ladder.report.colours import kind_class
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import arm_name, context_name, mixers, percent, size_name
from intarsia.ladder.results import ArmResult, Decoding, Measurements, Results
from intarsia.ladder.statistics import Estimate
from intarsia.ladder.verdict import Verdict
from intarsia.ladder.words import bracket, count


def table_section(plan: Plan, results: Results, verdict: Verdict) -> Markup:
    """One row for each arm and each baseline."""
    kinds = mixers(results)
    contexts = _contexts(results)
    heads = ["Parameters", "Held-out bits per byte", "Training tokens/s"]
    heads += [f"Decoding after {context_name(context)}" for context in contexts]
    body = [_arm_row(results, verdict, index, heads, contexts, kinds) for index in range(len(results.arms))]
    for row, baseline in zip(
        [row for row in verdict.rows if row.is_baseline], results.baselines, strict=True
    ):
        counts = f"{count(baseline.parameters)} counts" if baseline.parameters else None
        cells = [counts, _level(row.estimate) if row.estimate else None, *[None] * (len(heads) - 2)]
        name = tag("td", row.name, tag("span", row.note, class_="note") if row.note else None)
        body.append(tag("tr", name, _cells(heads, cells), class_="baseline"))
    return tag(
        "section",
        tag("h2", "The table"),
        tag(
            "div",
            tag("table", tag("thead", _heads(contexts)), tag("tbody", body), class_="cards"),
            class_="scroll",
        ),
        _tiles_legend(kinds),
        tag(
            "p",
            "Parameters without embeddings, + those of the embeddings. Bits per byte with an interval of "
            f"{percent(verdict.confidence)} over documents and seeds; most of it is the documents, which all models "
            "share, so compare models by the differences below and not by these. Decoding: time for one token and "
            "size of all layers' states, at batch 1. Speeds were measured after all training, one model at a time, "
            "in turn: medians, with the range of the middle half of the timings.",
            class_="quiet",
        ),
    )


def _contexts(results: Results) -> list[int]:
    """At most three of the contexts at which decoding was measured; the figures show them all."""
    found = sorted({cost.context for arm in results.arms for cost in arm.measurements.decoding})
    return [found[0], found[len(found) // 2], found[-1]] if len(found) > 3 else found


def _heads(contexts: Sequence[int]) -> list[Markup]:
    two = 2 if contexts else None
    top = [tag("th", "Model", rowspan=two), tag("th", "Parameters", rowspan=two)]
    top += [tag("th", "Held-out bits per byte", rowspan=two), tag("th", "Training tokens/s", rowspan=two)]
    if not contexts:
        return [tag("tr", top)]
    top.append(tag("th", "Decoding after so many tokens", colspan=len(contexts), class_="group"))
    return [tag("tr", top), tag("tr", [tag("th", context_name(context)) for context in contexts])]


def _arm_row(
    results: Results,
    verdict: Verdict,
    index: int,
    heads: Sequence[str],
    contexts: Sequence[int],
    kinds: Sequence[str],
) -> Markup:
    arm = results.arms[index]
    level = verdict.row(arm.name).estimate
    costs = {cost.context: cost for cost in arm.measurements.decoding}
    cells: list[object] = [
        _size_of(arm),
        _level(level) if level else "no run finished",
        _speed(arm.measurements),
        *[_decoding(costs[context]) if context in costs else None for context in contexts],
    ]
    name = tag(
        "td",
        arm_name(arm, index),
        tag("span", arm.note, class_="note") if arm.note else None,
        layout_strip(arm.layout.split(), kinds),
    )
    return tag("tr", name, _cells(heads, cells), class_="best" if arm.name == verdict.lowest else None)


def _size_of(arm: ArmResult) -> list[object]:
    rest = count(arm.parameters - arm.non_embedding_parameters)
    return [f"{count(arm.non_embedding_parameters)} ", tag("small", f"+ {rest}")]


def _speed(found: Measurements) -> list[object] | None:
    if not found.training_tokens_per_second:
        return None
    spread = found.training_range
    text = f"{found.training_tokens_per_second:,.0f} "
    return [text, tag("small", f"{spread[0]:,.0f}–{spread[1]:,.0f}", class_="below") if spread else None]


def _decoding(cost: Decoding) -> list[object]:
    spread = f"{cost.range[0]:.2f}–{cost.range[1]:.2f} ms · " if cost.range else ""
    size = f"{spread}{size_name(cost.cache_bytes)}"
    return [f"{cost.milliseconds:.2f} ms ", tag("small", size, class_="below")]


def _cells(heads: Sequence[str], cells: Sequence[object]) -> list[Markup]:
    return [
        tag(
            "td",
            tag("span", cell if cell is not None else "–"),
            data_label=head,
            class_="empty" if cell is None else None,
        )
        for head, cell in zip(heads, cells, strict=True)
    ]


def _level(level: Estimate) -> list[object]:
    interval = level.interval
    return [f"{level.value:.3f} ", tag("small", bracket(interval.low, interval.high), class_="below")]


def _tiles_legend(kinds: Sequence[str]) -> Markup:
    items = [
        tag("li", tag("span", class_=f"swatch {kind_class(index)}"), name) for index, name in enumerate(kinds)
    ]
    return tag("ul", items, class_="legend tiles")
