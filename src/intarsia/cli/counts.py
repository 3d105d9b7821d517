"""Counts as people write them."""

from __future__ import annotations

from intarsia.errors import ConfigError


def parse_count(text: str) -> int:
    """`5000`, `20M`, `1.5B`, `64k`: a count with an optional decimal suffix.

    Raises:
        ConfigError: it is no positive number.
    """
    factors = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
    factor = factors.get(text[-1:].lower())
    try:
        number = float(text[:-1] if factor else text) * (factor or 1)
        if 1 <= number < 1e18:
            return round(number)
    except ValueError:
        pass
    raise ConfigError(f"expected a positive count such as 5000, 64k, 20M or 1.5B; got {text!r}")
