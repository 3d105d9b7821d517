"""A corpus from which something can be learned in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def texts(directory: Path) -> str:
    """Sixty small files of words that follow each other by a rule, in a new directory; a pattern that finds them."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(20)]
    for index in range(60):
        chosen = np.cumsum(rng.integers(1, 3, rng.integers(40, 120))) % len(words)
        (directory / f"{index:02}.txt").write_text(" ".join(words[word] for word in chosen))
    return str(directory / "*.txt")
