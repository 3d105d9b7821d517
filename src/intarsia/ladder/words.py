"""Numbers and names in sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

UNIT = "bits per byte"


def amount(value: float) -> str:
    """Bits per byte to three digits, or to four where the value is small."""
    return f"{value:.4f}" if abs(value) < 0.0095 else f"{value:.3f}"


def bracket(low: float, high: float) -> str:
    """`[0.004, 0.020]`, with a real minus sign."""
    digits = 4 if max(abs(low), abs(high)) < 0.0095 else 3
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def count(number: float) -> str:
    """`1.24 M`, `730`."""
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.0f}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
