"""Small pieces that several sections share."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ladder.report.colours import arm_class
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.results import ArmResult, ExamArm, Results
from intarsia.ladder.words import count


def arm_name(arm: ArmResult, index: int) -> Markup:
    """The arm with its colour."""
    return tag("span", tag("span", class_=f"swatch {arm_class(index)}"), arm.name, class_="arm")


def legend(results: Results) -> Markup:
    """The colours of the arms."""
    return names_legend([arm.name for arm in results.arms])


def names_legend(names: Sequence[str]) -> Markup:
    """The colours of arms by their names."""
    items = [tag("li", tag("span", class_=f"swatch {arm_class(i)}"), name) for i, name in enumerate(names)]
    return tag("ul", items, class_="legend")


def mixers(results: Results) -> list[str]:
    """The names of all mixers in the layouts, in the order in which they come."""
    return list(dict.fromkeys(name for arm in results.arms for name in arm.layout.split()))


def context_name(tokens: float) -> str:
    """`256`, `4k`: powers of two read best in binary thousands."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 256 == 0 else f"{tokens:,.0f}"


def size_name(number: float) -> str:
    """`1.5 MB`: decimal units, as axes have decimal marks."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


def percent(share: float) -> str:
    """`95 %`."""
    return f"{share * 100:.3g}\N{NO-BREAK SPACE}%"


def tokens_a_run(results: Results) -> str:
    """`400 k`, or `380 k to 400 k` where arms read different amounts."""
    amounts = [arm.tokens for arm in results.arms if arm.tokens] or [results.tokens_per_run]
    return " to ".join(dict.fromkeys((count(min(amounts)), count(max(amounts)))))


def exam_cell(arm: ExamArm) -> str:
    """`99.2 (98.4–99.8)`: right answers in %, the least and the most over seeds; `*`: a rate at its grid's end."""
    if arm.answers is None:
        return "no run finished"
    mean, least, most = (100 * share for share in arm.answers)
    spread = f" ({least:.1f}–{most:.1f})" if len(arm.judged) > 1 else ""
    return f"{mean:.1f}{spread}{'*' * arm.at_edge}"
