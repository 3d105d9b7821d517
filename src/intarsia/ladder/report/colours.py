"""Which colour an arm and a mixer have, by their places in the plan. The style sheet has one for each class."""

from __future__ import annotations

COLOURS = 10
"""From the next on they come again."""


def arm_class(index: int) -> str:
    return f"arm-{index % COLOURS}"


def kind_class(index: int) -> str:
    """Of a kind of mixer."""
    return f"kind-{index % COLOURS}"
