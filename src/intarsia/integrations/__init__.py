"""Intarsia's operators inside other libraries' models. Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intarsia.integrations.transformers import Acceleration


def accelerate_transformers() -> Acceleration:
    """Let the linear-attention models of transformers run on Intarsia's operators, on CPUs.

    See `intarsia.integrations.transformers.accelerate_transformers`.
    """
    from intarsia.integrations.transformers import accelerate_transformers as accelerate

    return accelerate()


__all__ = ["accelerate_transformers"]
