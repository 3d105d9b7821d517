"""The families of published checkpoints by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

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
    "glm_moe_dsa",
    "glm5_next",
    "rwkv7",
)
"""By how many people have them. Each is a file in `families/` that ends in `FAMILY = Family(...)`."""


@dataclass(frozen=True)
class NotRead:
    """Published models that are known, and that the model lacks a part for."""

    title: str
    model_types: tuple[str, ...]
    lacks: str


NOT_READ = (
    NotRead(
        "Qwen4-Exp",
        ("qwen4_exp", "qwen4_exp_text"),
        "hyper-connections of low rank (`hc_lowrank`), embeddings of hashed n-grams inside layers (`ple_layer_ids`), "
        "attention to pools of tokens that an indexer chooses (`indexer_compress_ratio`)",
    ),
    NotRead(
        "Ling and Ring linear 2.0",
        ("bailing_moe_linear", "bailing_moe_linear_v2"),
        "the names of its softmax layers; its Lightning Attention is that of Ling and Ring 2.5, which are read",
    ),
)
"""Refused by the name of what is missing."""


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


def family_of(model_type: object, where: str) -> Family:
    """The family that reads a `model_type`.

    Raises:
        UnsupportedError: there is none; the message has those that there are.
    """
    for found in families():
        if model_type in found.model_types:
            return found
    for other in NOT_READ:
        if model_type in other.model_types:
            raise UnsupportedError(
                f"{where} is of {other.title}, and the model has no part for it yet: {other.lacks}"
            )
    known = ", ".join(kind for found in families() for kind in found.model_types)
    raise UnsupportedError(
        f"{where} is of the model_type {model_type!r}, which is not read yet; known are: {known}"
    )
