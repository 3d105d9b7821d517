"""The points of a scaling law, from comparisons that were run at several sizes and budgets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from intarsia.errors import ConfigError
from intarsia.ladder.scaling_law import Point


def points_of(arm: str, verdicts: Iterable[str | Path]) -> list[Point]:
    """The judged runs of an arm: parameters without embeddings, tokens, bits per byte of held-out text.

    Args:
        verdicts: files `verdict.json` of comparisons, on the same text: one for each size and budget.

    Raises:
        ConfigError: a file is missing, has not this arm, or was judged by other documents than the first.
    """
    points, judged = [], None
    for path in map(Path, verdicts):
        if not path.is_file():
            raise ConfigError(f"there is no {path}: run the comparison first")
        found = json.loads(path.read_text(encoding="utf-8"))
        by = (
            found["environment"].get("data", {}).get("fingerprint"),
            found["documents"],
            found["text_bytes"],
        )
        if judged is not None and by != judged:
            raise ConfigError(
                f"{path} was judged by other documents than those before it: bits per byte differ by that"
            )
        judged = by
        here = [each for each in found["arms"] if each["name"] == arm]
        if not here:
            raise ConfigError(
                f"{path} has no arm {arm!r}: {', '.join(each['name'] for each in found['arms'])}"
            )
        points += [
            Point(here[0]["non_embedding_parameters"], here[0]["tokens"], run["bits_per_byte"])
            for run in here[0]["runs"]
            if run["role"] == "judged" and run["failure"] is None
        ]
    return points
