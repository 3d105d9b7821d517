"""Numbers against the bounds that they must keep."""

from __future__ import annotations

from typing import Any

from intarsia.errors import OptionError


def check_bounds(
    config: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Make sure that the fields of these names are within bounds; of a list, every number. None keeps all bounds.

    Raises:
        OptionError: the first that is not.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    told = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is None:
                continue
            within = (
                (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            )
            if not within:
                raise OptionError(f"must be {told}; got {number!r}", (name,))
