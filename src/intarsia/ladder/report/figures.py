"""The figures of the report and the words around them."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ladder.report.charts import Bar, Line, forest_figure, line_figure
from intarsia.ladder.report.colours import arm_class
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import context_name, legend, percent, size_name
from intarsia.ladder.results import CurvePoint, Results
from intarsia.ladder.statistics import Estimate
from intarsia.ladder.verdict import PairVerdict, Verdict
from intarsia.ladder.words import bracket, count


def differences_section(results: Results, verdict: Verdict) -> Markup:
    """The forest figure: each pair's difference with its intervals."""
    pairs = [pair for pair in verdict.pairs if pair.difference is not None]
    bars = [_bar(pair, pair.difference) for pair in pairs if pair.difference is not None]
    sure = percent(verdict.confidence)
    several = len(pairs) > 1
    return tag(
        "section",
        tag("h2", "The differences"),
        tag(
            "p",
            "Paired: the same documents, and for each seed the same batches in the same order. Left of zero, the arm "
            "that is named first needs fewer bits.",
        ),
        tag(
            "figure",
            forest_figure(
                bars,
                title="Differences in bits per byte between each pair of architectures, with intervals",
                x_label="difference in bits per byte",
                left_label="first is better",
                right_label="second is better",
                number=lambda value: f"{value:.3f}".replace("-", "−") if value else "0",
            ),
            tag(
                "figcaption",
                f"Thick: {sure} interval of that pair alone. Thin, and in brackets: "
                + (
                    f"widened so that all {len(pairs)} intervals hold together with {sure} (Bonferroni); "
                    "the verdict goes by these. "
                    if several
                    else "the same. "
                )
                + "Small strokes below: the single seeds.",
            ),
        ),
    )


def _bar(pair: PairVerdict, difference: Estimate) -> Bar:
    wide = difference.simultaneous
    sign = "−" if difference.value < 0 else "+"
    return Bar(
        label=f"{pair.first} vs {pair.second}",
        value=difference.value,
        inner=(difference.interval.low, difference.interval.high),
        outer=(wide.low, wide.high),
        single=difference.per_seed,
        text=f"{sign}{abs(difference.value):.3f} {bracket(wide.low, wide.high)}",
        css="decided" if pair.better else "undecided",
    )


def curves_section(results: Results) -> Markup:
    """Bits per byte during training: of the text as it was read, and of held-out text where the plan asks."""

    def figure(kind: str, heading: str) -> Markup | None:
        lines: list[Line] = []
        for index, arm in enumerate(results.arms):
            runs = [run for run in arm.runs if run.role == "judged"]
            curves = [
                (run, _smooth(run.training_curve) if kind == "training" else run.heldout_curve)
                for run in runs
            ]
            curves = [(run, curve) for run, curve in curves if curve]
            lines += [
                Line(run.name, arm_class(index), _points(curve), faint=True, failed=run.failure is not None)
                for run, curve in curves
            ]
            finished = [curve for run, curve in curves if run.failure is None]
            if finished:
                lines.append(Line(arm.name, arm_class(index), _mean_curve(finished), dots=kind != "training"))
        if not lines:
            return None
        return tag(
            "figure",
            tag("h3", heading),
            line_figure(
                lines,
                title=heading,
                x_label="tokens read",
                y_label="bits per byte",
                x_format=count,
                y_format=lambda value: f"{value:.2f}",
                y_range=_curve_range(lines),
            ),
        )

    drawn = [
        figure("training", "Training text, as it was read"),
        figure("heldout", "Held-out text"),
    ]
    if not any(drawn):
        return Markup("")
    return tag(
        "section",
        tag("h2", "How they learned"),
        legend(results),
        drawn,
        tag(
            "p",
            "Thick: the mean over seeds. Thin: each seed. A cross marks a run that failed. "
            "Training text is averaged over a twentieth of the run. The first part of the fall is cut off.",
            class_="quiet",
        ),
    )


def _smooth(curve: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Each point as the mean of its neighbours within a fortieth of the curve on either side.

    How hard the text of a few steps is says nothing about the model.
    """
    reach = len(curve) // 40
    return tuple(
        CurvePoint(point.tokens, sum(near) / len(near))
        for index, point in enumerate(curve)
        if (near := [p.bits_per_byte for p in curve[max(0, index - reach) : index + reach + 1]])
    )


def _points(curve: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    return [(point.tokens, point.bits_per_byte) for point in curve]


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[tuple[float, float]]:
    """The mean of several curves at the places that all have."""
    values = [{point.tokens: point.bits_per_byte for point in curve} for curve in curves]
    places = sorted(set.intersection(*[set(value) for value in values]))
    return [(place, sum(value[place] for value in values) / len(values)) for place in places]


def _curve_range(lines: Sequence[Line]) -> tuple[float, float]:
    """From a little below the lowest point to where the curves are after a sixth of the run."""
    points = [point for line in lines for point in line.points]
    last = max(x for x, _ in points)
    low = min(y for _, y in points)
    early = [y for x, y in points if x >= last / 6] or [y for _, y in points]
    high = max(early)
    room = (high - low or 1.0) * 0.05
    return low - room, high + room


def positions_section(results: Results) -> Markup:
    """Loss against the position in a piece: what an arm makes of more context, as far as was judged."""
    lines = []
    for index, arm in enumerate(results.arms):
        runs = [run.positions for run in arm.judged.values() if run.positions]
        if runs:
            losses = [
                sum(each.bits_per_token for each in place) / len(runs) for place in zip(*runs, strict=True)
            ]
            places = [(octave.start + octave.stop - 1) / 2 + 1 for octave in runs[0]]
            lines.append(Line(arm.name, arm_class(index), list(zip(places, losses, strict=True)), dots=True))
    if not lines:
        return Markup("")
    return tag(
        "section",
        tag("h2", "What context is good for"),
        tag(
            "p",
            f"Held-out documents were judged in pieces of {results.length:,} tokens. The mean loss of a token by its "
            "place in its piece, over seeds: an arm that makes more of a long context falls further to the right. "
            "Longer contexts were not judged.",
        ),
        legend(results),
        tag(
            "figure",
            line_figure(
                lines,
                title="Bits per token against the position in the piece",
                x_label="position in the piece",
                y_label="bits per token",
                x_format=lambda value: f"{value:,.0f}",
                y_format=lambda value: f"{value:.2f}",
                x_log=True,
            ),
        ),
    )


def costs_section(results: Results) -> Markup:
    """Time and state of decoding against context."""

    def lines(value: str) -> list[Line]:
        return [
            Line(
                arm.name,
                arm_class(index),
                [(cost.context, float(getattr(cost, value))) for cost in arm.measurements.decoding],
                dots=True,
            )
            for index, arm in enumerate(results.arms)
            if arm.measurements.decoding
        ]

    if not lines("milliseconds"):
        return Markup("")
    contexts = sorted({x for line in lines("milliseconds") for x, _ in line.points})
    return tag(
        "section",
        tag("h2", "What a long context costs"),
        tag(
            "p",
            "A linear layer keeps a state of fixed size; an attention layer keeps something for every "
            "token it has read.",
        ),
        legend(results),
        tag(
            "div",
            tag(
                "figure",
                tag("h3", "Time to decode a token"),
                line_figure(
                    lines("milliseconds"),
                    title="Milliseconds per decoded token against context",
                    x_label="tokens already read",
                    y_label="milliseconds per token",
                    x_format=context_name,
                    y_format=lambda value: f"{value:.3g}",
                    x_ticks=contexts,
                    x_log=True,
                    y_range=(0, max(y for line in lines("milliseconds") for _, y in line.points) * 1.08),
                    small=True,
                ),
            ),
            tag(
                "figure",
                tag("h3", "Size of the cache"),
                line_figure(
                    lines("cache_bytes"),
                    title="Bytes of state against context",
                    x_label="tokens already read",
                    y_label="bytes",
                    x_format=context_name,
                    y_format=size_name,
                    x_ticks=contexts,
                    x_log=True,
                    y_log=True,
                    small=True,
                ),
            ),
            class_="pair",
        ),
    )
