"""Other libraries' interfaces over Intarsia's operators and models: `fla`, the functions of flash-linear-attention by
name; what puts the operators inside other libraries' models; and `huggingface`, our models as models of transformers.
Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from intarsia.integrations.replacements import Acceleration
    from intarsia.integrations.transformers_packed import PreparedModel
    from intarsia.ops.packed_weights import WeightFormat


def accelerate_transformers() -> Acceleration:
    """Let the linear-attention models of transformers run on Intarsia's operators, on CPUs, and let all its models
    have softmax attention by `attn_implementation="intarsia"`.

    See `intarsia.integrations.transformers.accelerate_transformers`.
    """
    from intarsia.integrations.transformers import accelerate_transformers as accelerate

    return accelerate()


def prepare_for_inference(
    model: nn.Module,
    weights: WeightFormat | None = None,
    *,
    group: int | None = None,
    zeros: bool = False,
    attention: bool = True,
) -> PreparedModel:
    """Let a model of transformers decode with packed weights and Intarsia's attention, until it is undone.

    See `intarsia.integrations.transformers_packed.prepare_for_inference`.
    """
    from intarsia.integrations.transformers_packed import prepare_for_inference as prepare

    return prepare(model, weights, group=group, zeros=zeros, attention=attention)


def accelerate_fla() -> Acceleration:
    """Let the layers of flash-linear-attention run on CPUs, on Intarsia's operators.

    See `intarsia.integrations.fla.acceleration.accelerate_fla`.
    """
    from intarsia.integrations.fla.acceleration import accelerate_fla as accelerate

    return accelerate()


__all__ = ["accelerate_fla", "accelerate_transformers", "prepare_for_inference"]
