"""The figures of a ladder's report: laws with bands, multipliers, cost against quality, states against context."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from intarsia.ladder.ladder_record import size_exponent, size_exponent_interval
from intarsia.ladder.ladder_results import Ascent, RungResult, compute_of, points_of_arm
from intarsia.ladder.report.charts import Band, Line, line_figure
from intarsia.ladder.report.colours import arm_class
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import context_name, names_legend, size_name
from intarsia.ladder.results import ArmResult
from intarsia.ladder.scaling_law import ScalingFit
from intarsia.ladder.words import bracket

_FLOPS = 6.0
"""For a parameter and a token."""


def _css(ascent: Ascent, arm: str) -> str:
    return arm_class(ascent.ladder.arms.index(arm))


def _exponent(value: float) -> str:
    """`1e12`."""
    return f"{value:.0e}".replace("e+", "e")


def law_section(ascent: Ascent) -> Markup:
    """Every judged run by its compute, and what the laws say that the compute buys when it is well spent."""
    lines, bands, rows = [], [], []
    for arm in ascent.ladder.arms:
        points = sorted(points_of_arm(arm, ascent.rungs), key=lambda p: p.parameters * p.tokens)
        css, law = _css(ascent, arm), ascent.laws[arm]
        for size in sorted({point.parameters for point in points}):
            curve = [(_FLOPS * p.parameters * p.tokens, p.loss) for p in points if p.parameters == size]
            lines.append(Line(f"{arm}, {size:,} parameters", css, _means(curve), dots=True))
        if law.fit is None:
            rows.append(_law_row(arm, law.why_not))
            continue
        spent = [_FLOPS * p.parameters * p.tokens for p in points]
        places = [float(place) for place in np.geomspace(min(spent), max(spent), 24)]
        bands.append(Band(css, [_bought(law.fit, place) for place in places]))
        lines.append(Line(f"{arm}, law", css, [(c, law.fit.law.optimal_loss(c)) for c in places], faint=True))
        rows.append(_law_row(arm, _law_words(law.fit)))
    if not any(line.points for line in lines):
        return Markup("")
    losses = [y for line in lines for _, y in line.points]
    room = (max(losses) - min(losses) or 1.0) * 0.08
    return tag(
        "section",
        tag("h2", "What compute buys"),
        tag(
            "p",
            "Dots: the mean over seeds of each size and budget, one line for each size. Thin, with its band of 95 %: "
            "what the fitted law says that the compute buys with the best size for it; the band is bootstrapped "
            "through the fit.",
        ),
        names_legend(ascent.ladder.arms),
        tag(
            "figure",
            line_figure(
                lines,
                title="Bits per byte against compute, with scaling laws",
                x_label="FLOPs of training (6 · parameters · tokens)",
                y_label="bits per byte",
                x_format=_exponent,
                y_format=lambda value: f"{value:.2f}",
                x_log=True,
                y_range=(min(losses) - room, max(losses) + room),
                bands=bands,
            ),
        ),
        tag("ul", rows, class_="limits"),
    )


def _bought(fit: ScalingFit, compute: float) -> tuple[float, float, float]:
    """The compute, and between what the loss lies that it buys."""
    return compute, *fit.interval(lambda law: law.optimal_loss(compute))


def _means(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    places = sorted({x for x, _ in curve})
    return [(place, float(np.mean([y for x, y in curve if x == place]))) for place in places]


def _law_row(arm: str, text: str) -> Markup:
    return tag("li", tag("strong", f"{arm}: "), text)


def _law_words(fit: ScalingFit) -> str:
    law = fit.law
    irreducible, alpha, beta = (
        bracket(*fit.interval(lambda one, name=name: getattr(one, name)))  # type: ignore[misc]
        for name in ("irreducible", "alpha", "beta")
    )
    return (
        f"L = {law.irreducible:.3f} {irreducible} + {law.a:.3g} / N^{law.alpha:.2f} {alpha} + "
        f"{law.b:.3g} / D^{law.beta:.2f} {beta}; the best size grows with compute to the power "
        f"{size_exponent(law):.2f} {bracket(*size_exponent_interval(fit))}; {len(fit.points)} runs"
    )


def multiplier_section(ascent: Ascent) -> Markup:
    """How much compute each arm saves, and where curves cross."""
    lines, bands, said = [], [], []
    for arm, found in ascent.against.items():
        if found.crossing is None:
            said.append(tag("li", tag("strong", f"{arm}: "), found.why_not))
            continue
        css = _css(ascent, arm)
        finite = [(one.compute, one.value) for one in found.multipliers if math.isfinite(one.value)]
        if finite:
            lines.append(Line(arm, css, finite, dots=True))
        bands.append(Band(css, [(one.compute, one.low, one.high) for one in found.multipliers]))
        said.append(tag("li", tag("strong", f"{arm}: "), found.crossing.sentence))
    if not said:
        return Markup("")
    return tag(
        "section",
        tag("h2", f"Compute that {ascent.ladder.baseline} needs for the same loss"),
        tag(
            "p",
            f"How many times the compute of an arm {ascent.ladder.baseline} needs to be as good, both spending it "
            "well, by the laws. Above 1 the arm saves compute. Band: 95 %, bootstrapped through both fits in pairs.",
        ),
        tag(
            "figure",
            line_figure(
                lines,
                title="Compute multiplier against compute",
                x_label="FLOPs of training",
                y_label="times the compute",
                x_format=_exponent,
                y_format=lambda value: f"{value:.3g}",
                x_log=True,
                y_log=True,
                bands=bands,
                y_range=_multiplier_range([y for line in lines for _, y in line.points]),
            ),
        )
        if lines
        else None,
        tag("ul", said, class_="limits"),
    )


def _multiplier_range(values: list[float]) -> tuple[float, float]:
    """With 1 in it, and room for the bands."""
    return min(*values, 1.0) / 2, max(*values, 1.0) * 2


def cost_section(ascent: Ascent) -> Markup:
    """Quality against what it costs: FLOPs of training by each model's own count, and time to decode a token."""
    by_size = _tops(ascent)
    trained, decoded = [], []
    for arm in ascent.ladder.arms:
        css = _css(ascent, arm)
        for size in ascent.ladder.sizes:
            spent = [
                (compute_of(found), level[0])
                for result in ascent.rungs
                if result.rung.size == size.name
                and (found := result.arm(arm)) is not None
                and (level := result.level(arm)) is not None
            ]
            if spent:
                trained.append(Line(f"{arm}, {size.name}", css, sorted(spent), dots=True))
        waited = [
            (measured.measurements.decoding[-1].milliseconds, level[0])
            for first, last in by_size
            if (measured := first.arm(arm)) is not None
            and measured.measurements.decoding
            and (level := last.level(arm)) is not None
        ]
        if waited:
            decoded.append(Line(arm, css, sorted(waited), dots=True))
    if not trained:
        return Markup("")
    contexts = [
        arm.measurements.decoding[-1].context
        for first, _ in by_size
        for arm in first.results.arms
        if arm.measurements.decoding
    ]
    where = f" after {context_name(max(contexts))} tokens" if contexts else ""
    return tag(
        "section",
        tag("h2", "Quality and what it costs"),
        tag(
            "p",
            "Lower and further left is better: an arm of which no other is both lies on the edge of what can be had. "
            "Each dot under training is a rung, and a line a size; each under decoding is a size with its largest "
            "budget.",
        ),
        names_legend(ascent.ladder.arms),
        tag(
            "div",
            _pareto(trained, "Training", "FLOPs of a run, by each model's own count", _exponent),
            _pareto(decoded, "Decoding", f"milliseconds per token{where}", lambda value: f"{value:.3g}")
            if decoded
            else None,
            class_="pair",
        ),
    )


def _tops(ascent: Ascent) -> list[tuple[RungResult, RungResult]]:
    """Of each size, the rung on which costs were measured and the highest that was climbed."""
    sizes = dict.fromkeys(result.rung.size for result in ascent.rungs)
    each = [[result for result in ascent.rungs if result.rung.size == size] for size in sizes]
    return [(results[0], results[-1]) for results in each]


def _pareto(lines: list[Line], heading: str, x_label: str, x_format: Callable[[float], str]) -> Markup:
    return tag(
        "figure",
        tag("h3", heading),
        line_figure(
            lines,
            title=f"Bits per byte against {x_label}",
            x_label=x_label,
            y_label="bits per byte",
            x_format=x_format,
            y_format=lambda value: f"{value:.2f}",
            x_log=True,
            small=True,
        ),
    )


def state_section(ascent: Ascent) -> Markup:
    """Bytes of states against context, at the largest size that was climbed."""
    if not ascent.rungs:
        return Markup("")
    first, _ = _tops(ascent)[-1]
    arms: list[ArmResult] = [arm for arm in first.results.arms if arm.measurements.decoding]
    if not arms:
        return Markup("")
    lines = [
        Line(
            arm.name,
            _css(ascent, arm.name),
            [(cost.context, float(cost.cache_bytes)) for cost in arm.measurements.decoding],
            dots=True,
        )
        for arm in arms
    ]
    return tag(
        "section",
        tag("h2", "What is kept of a context"),
        tag("p", f"Bytes of all layers' states of the models of {first.rung.size}, measured on the tensors."),
        names_legend(ascent.ladder.arms),
        tag(
            "figure",
            line_figure(
                lines,
                title="Bytes of state against context",
                x_label="tokens already read",
                y_label="bytes",
                x_format=context_name,
                y_format=size_name,
                x_ticks=sorted({x for line in lines for x, _ in line.points}),
                x_log=True,
                y_log=True,
            ),
        ),
    )
