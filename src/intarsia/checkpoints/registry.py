"""The families of published checkpoints by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from intarsia.checkpoints.family import Family
from intarsia.errors import UnsupportedError, did_you_mean

CHECKPOINTS = (
    "qwen3_5",
    "qwen3_5_moe",
    "kimi_linear",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v32",
    "olmo_hybrid",
    "minimax",
    "minimax_m2",
    "minimax_m3",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "granitemoehybrid",
    "falcon_h1",
    "mamba2",
    "bailing_hybrid",
    "bailing_moe_linear",
    "glm_moe_dsa",
    "glm5_next",
    "qwen4_exp",
    "minicpm_sala",
    "rwkv7",
)
"""By how many people have them. Each is a file in `families/` that ends in `FAMILY = Family(...)`."""


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in CHECKPOINTS:
        raise UnsupportedError(
            f"there is no family {name!r} of checkpoints{did_you_mean(name, CHECKPOINTS)}. Without a name it is the "
            "first that can hold the model, and 'intarsia' is this package's own format"
        )
    found: Family = importlib.import_module(f"intarsia.checkpoints.families.{name}").FAMILY
    return found


def families() -> list[Family]:
    """All of them."""
    return [family(name) for name in CHECKPOINTS]


NOT_READ: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v4": "its layers attend to compressed entries and to a window in one softmax, with sinks, which "
        "is none of the mixers here nor a sum of them"
    }
)
"""Why no family reads some that might be expected."""


def family_of(model_type: object, where: str) -> Family:
    """The family that reads a `model_type`.

    Raises:
        UnsupportedError: there is none; the message has those that there are.
    """
    for found in families():
        if model_type in found.model_types:
            return found
    if isinstance(model_type, str) and model_type in NOT_READ:
        raise UnsupportedError(
            f"{where} is of the model_type {model_type!r}, which is not read: {NOT_READ[model_type]}"
        )
    known = ", ".join(kind for found in families() for kind in found.model_types)
    raise UnsupportedError(
        f"{where} is of the model_type {model_type!r}, which is not read yet; known are: {known}"
    )
