"""Other libraries' interfaces over Intarsia's operators: `fla`, the functions of flash-linear-attention by name, and
what puts the operators inside other libraries' models. Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intarsia.integrations.replacements import Acceleration


def accelerate_transformers() -> Acceleration:
    """Let the linear-attention models of transformers run on Intarsia's operators, on CPUs.

    See `intarsia.integrations.transformers.accelerate_transformers`.
    """
    from intarsia.integrations.transformers import accelerate_transformers as accelerate

    return accelerate()


def accelerate_fla() -> Acceleration:
    """Let the layers of flash-linear-attention run on CPUs, on Intarsia's operators.

    See `intarsia.integrations.fla.acceleration.accelerate_fla`.
    """
    from intarsia.integrations.fla.acceleration import accelerate_fla as accelerate

    return accelerate()


__all__ = ["accelerate_fla", "accelerate_transformers"]
