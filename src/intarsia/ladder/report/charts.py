"""Figures as SVG, drawn twice: wide for a desk and for paper, narrow for a phone. The style sheet shows one.

Colours come from the style sheet by class (`arm-0`, `arm-1`, ...), so that light, dark and print each have their own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intarsia.ladder.report.colours import kind_class
from intarsia.ladder.report.markup import Markup, join, tag

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One line of a figure. `css` chooses the colour; a faint line stands behind, without marks."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False
    """Draw a dot at each point. Otherwise points only answer the pointer."""
    failed: bool = False
    """End with a cross."""


@dataclass(frozen=True)
class Band:
    """What lies between a lower and an upper line, behind all lines: places `(x, low, high)`."""

    css: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Bar:
    """One row of a forest figure: a value with a narrow and a wide interval, and the single values behind it."""

    label: str
    value: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    single: Sequence[float]
    text: str
    css: str


@dataclass(frozen=True)
class Axis:
    """How numbers become positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        round((first + i) * step, 12)
        for i in range(int((high - low) / step + 1e-9) + 1)
        if (first + i) * step <= high * (1 + 1e-12) + 1e-12
    ]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 2, 5 times powers of ten, fewer where there would be too many."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [
            factor * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factor in factors
            if low * 0.999 <= factor * 10.0**power <= high * 1.001
        ]
        if len(marks) <= count:
            break
    return marks


def line_figure(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_format: Format,
    y_format: Format,
    x_ticks: Sequence[float] | None = None,
    x_log: bool = False,
    y_log: bool = False,
    y_range: tuple[float, float] | None = None,
    small: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Lines over a common pair of axes. `small`: two such figures stand side by side on a desk."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return tag("p", "Nothing was measured.", class_="quiet")
    low, high = y_range or _padded(min(ys), max(ys), y_log)

    def draw(width: float, height: float, css: str) -> Markup:
        left, right, top, bottom = 52.0, 14.0, 26.0, 40.0
        x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left + 6, width - right - 6, x_log)
        y = Axis(low, high, height - bottom, top, y_log)
        marks = log_ticks(low, high) if y_log else ticks(low, high, 5)
        places = x_ticks or (
            log_ticks(x.low, x.high) if x_log else ticks(x.low, x.high, 4 if width < 500 else 7)
        )
        clip = f"clip-{zlib.crc32(title.encode()):x}-{css}"
        parts: list[Markup] = [
            tag(
                "clipPath",
                tag("rect", x=left, y=top - 4, width=width - left, height=height - bottom - top + 8),
                id=clip,
            )
        ]
        for mark in marks:
            parts.append(tag("line", x1=left, x2=width - right, y1=y.at(mark), y2=y.at(mark), class_="grid"))
            parts.append(tag("text", y_format(mark), x=left - 7, y=y.at(mark) + 4, class_="tick end"))
        for place in places:
            parts.append(
                tag("text", x_format(place), x=x.at(place), y=height - bottom + 18, class_="tick middle")
            )
            parts.append(
                tag(
                    "line",
                    x1=x.at(place),
                    x2=x.at(place),
                    y1=height - bottom,
                    y2=height - bottom + 4,
                    class_="axis",
                )
            )
        parts.append(
            tag("line", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom, class_="axis")
        )
        parts.append(tag("text", y_label, x=left - 44, y=12, class_="label"))
        parts.append(tag("text", x_label, x=width - right, y=height - 4, class_="label end"))
        drawn = []
        for band in bands:
            # Beyond the picture is far enough, also where an end is infinite.
            far = [(x.at(a), *(y.at(min(max(b, low), high)) for b in ends)) for a, *ends in band.points]
            edge = [*((a, b) for a, b, _ in far), *((a, c) for a, _, c in reversed(far))]
            path = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in edge) + "Z"
            drawn.append(tag("path", d=path, class_=f"band {band.css}"))
        for line in sorted(lines, key=lambda line: not line.faint):
            path = "M" + "L".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line.points)
            drawn.append(
                tag("path", d=path, class_=f"line {line.css}{' faint' * line.faint}{' dotted' * line.dots}")
            )
            if line.failed:
                a, b = line.points[-1]
                u, v = x.at(a), y.at(min(max(b, low), high))
                cross = f"M{u - 4:.1f},{v - 4:.1f}l8,8m0,-8l-8,8"
                drawn.append(
                    tag("path", tag("title", f"{line.name}: failed here"), d=cross, class_=f"line {line.css}")
                )
            if line.faint:
                continue
            for a, b in line.points:
                if low <= b <= high:
                    drawn.append(
                        tag(
                            "circle",
                            tag("title", f"{line.name}: {y_format(b)} at {x_format(a)}"),
                            cx=x.at(a),
                            cy=y.at(b),
                            r=4 if line.dots else 3,
                            class_=f"{'dot' if line.dots else 'dot hidden'} {line.css}",
                        )
                    )
        parts.append(tag("g", drawn, clip_path=f"url(#{clip})"))
        return _svg(parts, width, height, css, title)

    return _both(draw, (460, 320) if small else (760, 380), (350, 280))


def forest_figure(
    bars: Sequence[Bar], *, title: str, x_label: str, left_label: str, right_label: str, number: Format
) -> Markup:
    """Differences with their intervals against zero."""
    if not bars:
        return tag("p", "There is no difference to show.", class_="quiet")
    reach = max(abs(v) for bar in bars for v in (*bar.outer, *bar.inner, bar.value, 1e-6)) * 1.06

    def draw(width: float, row: float, css: str) -> Markup:
        narrow = width < 500
        # Wide enough for the longest words, in the sizes that the style sheet gives them.
        left = 8.0 if narrow else 8.8 * max(len(bar.label) for bar in bars) + 22
        right = 8.0 if narrow else 7.8 * max(len(bar.text) for bar in bars) + 18
        top, bottom = 24.0, 44.0
        height = top + row * len(bars) + bottom
        x = Axis(-reach, reach, left, width - right)
        base = height - bottom
        parts: list[Markup] = []
        for mark in ticks(-reach, reach, 4 if narrow else 6):
            parts.append(tag("line", x1=x.at(mark), x2=x.at(mark), y1=top, y2=base, class_="grid"))
            parts.append(tag("text", number(mark), x=x.at(mark), y=base + 16, class_="tick middle"))
        parts.append(tag("line", x1=x.at(0), x2=x.at(0), y1=top - 4, y2=base, class_="zero"))
        parts.append(tag("text", f"← {left_label}", x=x.at(0) - 8, y=12, class_="label end"))
        parts.append(tag("text", f"{right_label} →", x=x.at(0) + 8, y=12, class_="label"))
        parts.append(tag("text", x_label, x=(left + width - right) / 2, y=height - 6, class_="label middle"))
        for index, bar in enumerate(bars):
            y = top + row * (index + (0.78 if narrow else 0.5))
            if narrow:
                # Side by side they would meet on a phone.
                parts.append(tag("text", bar.label, x=left, y=y - 34, class_="name"))
                parts.append(tag("text", bar.text, x=left, y=y - 16, class_="value"))
            else:
                parts.append(tag("text", bar.label, x=left - 14, y=y + 4.5, class_="name end"))
                parts.append(tag("text", bar.text, x=width - right + 14, y=y + 4.5, class_="value"))
            described = tag("title", f"{bar.label}: {bar.text}")
            parts.append(
                tag(
                    "g",
                    described,
                    tag("line", x1=x.at(bar.outer[0]), x2=x.at(bar.outer[1]), y1=y, y2=y, class_="whisker"),
                    [
                        tag("line", x1=x.at(end), x2=x.at(end), y1=y - 5, y2=y + 5, class_="whisker")
                        for end in bar.outer
                    ],
                    tag("line", x1=x.at(bar.inner[0]), x2=x.at(bar.inner[1]), y1=y, y2=y, class_="interval"),
                    [
                        tag("line", x1=x.at(v), x2=x.at(v), y1=y + 9, y2=y + 14, class_="seed")
                        for v in bar.single
                    ],
                    tag("circle", cx=x.at(bar.value), cy=y, r=5, class_="estimate"),
                    class_=f"bar {bar.css}",
                )
            )
        return _svg(parts, width, height, css, title)

    return join(draw(840, 46, "wide"), draw(350, 84, "narrow"))


def layout_strip(layers: Sequence[str], kinds: Sequence[str]) -> Markup:
    """A model's layers as inlaid tiles, first layer left; the colour tells the mixer."""
    size, gap = 13.0, 2.0
    tiles = [
        tag(
            "rect",
            tag("title", f"layer {i}: {name}"),
            x=i * (size + gap),
            y=0,
            width=size,
            height=size,
            rx=2,
            class_=f"tile {kind_class(kinds.index(name))}",
        )
        for i, name in enumerate(layers)
    ]
    width = len(layers) * (size + gap) - gap
    label = f"layers: {' '.join(layers)}"
    return tag(
        "svg",
        tiles,
        viewBox=f"0 0 {width:g} {size:g}",
        width=width,
        height=size,
        class_="strip",
        role="img",
        aria_label=label,
    )


def _both(
    draw: Callable[[float, float, str], Markup], wide: tuple[float, float], narrow: tuple[float, float]
) -> Markup:
    return join(draw(*wide, "wide"), draw(*narrow, "narrow"))


def _svg(parts: Sequence[Markup], width: float, height: float, css: str, title: str) -> Markup:
    return tag(
        "svg",
        parts,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=f"figure {css}",
        role="img",
        aria_label=title,
    )


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.25, high * 1.25
    room = (high - low or abs(high) or 1.0) * 0.06
    return low - room, high + room
