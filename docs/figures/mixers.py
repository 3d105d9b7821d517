"""The tables of mixers in README.md and archaeology.md, from what the mixers tell of themselves.

    .venv/bin/python docs/figures/mixers.py

writes what stands between the `mixers` marks of the two pages, and the number of mixers in the README.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from intarsia.files import write_text
from intarsia.mixers import MixerConfig
from intarsia.mixers.registry import own_mixers

ROOT = Path(__file__).resolve().parents[2]
DECAYS = {"none": "no decay", "fixed": "fixed", "head": "chosen, per head", "channel": "chosen, per channel"}
OPERATORS = {
    "linear_attention": "`S ← Diag(exp g) S + k vᵀ`",
    "gated_delta_rule": "`S ← (I − β k kᵀ) Diag(exp g) S + β k vᵀ`",
    "dplr_rule": "`S ← (Diag(exp g) − a bᵀ) S + k vᵀ`",
}
BEGIN, END = "<!-- mixers: written by docs/figures/mixers.py -->\n", "<!-- /mixers -->"


def oldest_first() -> list[type[MixerConfig]]:
    """This package's mixers, in the order in which they were published."""
    return sorted(own_mixers(), key=lambda config: (config.about.year, config.about.source))


def names(configs: Sequence[type[MixerConfig]]) -> str:
    """Their names, as cells of tables have them."""
    return " ".join(f"`{config.type}`" for config in configs)


def erases(config: type[MixerConfig]) -> str:
    """What a token erases from the memory of a mixer of the linear family; empty for others."""
    if config.about.family in ("softmax", "convolution"):
        return ""
    if config.about.operator == "dplr_rule":
        return "anything"
    return "nothing" if config.about.family == "additive" else "along the key"


def by_decay() -> str:
    """A row for what is erased, a column for what fades."""
    lines = [f"| erases | {' | '.join(DECAYS.values())} |", f"| {' | '.join(['---'] * (1 + len(DECAYS)))} |"]
    for row in ("nothing", "along the key", "anything"):
        cells = [
            names([one for one in oldest_first() if erases(one) == row and one.about.decay == decay])
            for decay in DECAYS
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def by_operator() -> str:
    """A row an operator."""
    lines = ["| operator | one token | who |", "| --- | --- | --- |"]
    for operator, rule in OPERATORS.items():
        who = names([one for one in oldest_first() if one.about.operator == operator])
        lines.append(f"| [`{operator}`](operators.md) | {rule} | {who} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {"README.md": by_decay, "docs/archaeology.md": by_operator}


def written(page: str, text: str) -> str:
    """The text of a page with its table, and the number of mixers, as they should be."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{page} has no mark where the table of mixers begins: {BEGIN}"
    assert end, f"{page} has no mark where the table of mixers ends: {END}"
    text = f"{before}{begin}{TABLES[page]()}{end}{after}"
    return re.sub(r"\b\d+ token mixers", f"{len(own_mixers())} token mixers", text)


if __name__ == "__main__":
    for page in TABLES:
        write_text(ROOT / page, written(page, (ROOT / page).read_text(encoding="utf-8")))
