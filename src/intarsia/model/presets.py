"""Named models. Each is a function of the vocabulary's size; `get("kimi-linear-tiny")` calls one by name.

Three families in four sizes, made to be compared: in a size, all have the same width, depth and heads, and
the feed-forward of the two baselines is widened until they have as many parameters as Kimi Linear
(`match_parameters`), embedding and head not counted.

| family | layers | position |
| --- | --- | --- |
| `kimi-linear` | KDA 3 : MLA 1 | none in MLA |
| `gdn-hybrid` | Gated DeltaNet 3 : MLA 1 | RoPE in MLA |
| `full` | MLA everywhere | RoPE |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from intarsia.errors import ConfigError
from intarsia.mixers import GatedDeltaNetConfig, KDAConfig, MLAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig, unknown
from intarsia.model.language_model import cost_of
from intarsia.model.matching import match_parameters


@dataclass(frozen=True)
class Size:
    """The dimensions that the families share; `d_hidden` is Kimi Linear's feed-forward."""

    d_model: int
    depth: int
    num_heads: int
    head_dim: int
    kv_rank: int
    rope_dim: int
    d_hidden: int
    vocab_size: int


SIZES = {
    # Parameters without embeddings: 0.9 M, 3.4 M, 26 M, 116 M.
    "nano": Size(128, 4, 2, 64, 32, 32, 352, 1024),
    "tiny": Size(256, 4, 4, 64, 64, 32, 704, 4096),
    "small": Size(512, 8, 8, 64, 128, 32, 1408, 16384),
    "base": Size(768, 16, 12, 64, 256, 64, 2048, 32768),
}


def kimi_linear(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """Kimi Linear without experts: three layers of KDA to one of MLA without positions."""
    mixers = {"kda": KDAConfig(size.num_heads, size.head_dim), "mla": _mla(size, rotate=False)}
    return _model(size, vocab_size, layout="kda kda kda mla", mixers=mixers)


def gdn_hybrid(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """The report's GDN-H: three layers of Gated DeltaNet to one of MLA with RoPE."""
    mixers = {"gdn": GatedDeltaNetConfig(size.num_heads, size.head_dim), "mla": _mla(size, rotate=True)}
    return _matched(size, _model(size, vocab_size, layout="gdn gdn gdn mla", mixers=mixers))


def full(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """The report's baseline: MLA with RoPE in every layer."""
    return _matched(size, _model(size, vocab_size, layout="mla", mixers={"mla": _mla(size, rotate=True)}))


def kimi_linear_tiny_moe(vocab_size: int | None = None) -> ModelConfig:
    """`kimi-linear-tiny` with 16 experts, 3 of them and a shared one active, in all layers but the first."""
    size = SIZES["tiny"]
    experts = ExpertsConfig(
        num_experts=16, d_hidden=size.d_hidden // 4, num_active=3, routed_scaling_factor=2.446
    )
    return kimi_linear(size, vocab_size).replace(experts=experts)


def kimi_linear_48b_a3b(vocab_size: int | None = None) -> ModelConfig:
    """The released Kimi-Linear-48B-A3B: 49.12 B parameters, of which 3.1 B compute a token.

    The routing weights are unbiased, as in the report. The code released with the weights adds the router's
    bias to them: `ExpertsConfig.routing_weights="biased"` does the same.
    """
    return ModelConfig(
        vocab_size=163840 if vocab_size is None else vocab_size,
        d_model=2304,
        depth=27,
        # Full attention in layers 3, 7, …, 23 and 26, counted from 0.
        layout=" ".join(["kda kda kda mla"] * 6 + ["kda kda mla"]),
        mixers={
            "kda": KDAConfig(num_heads=32, head_dim=128),
            "mla": MLAConfig(num_heads=32, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rotate=False),
        },
        feed_forward=FeedForwardConfig(d_hidden=9216),
        experts=ExpertsConfig(num_experts=256, d_hidden=1024, num_active=8, routed_scaling_factor=2.446),
        tie_embeddings=False,
    )


PRESETS: dict[str, Callable[[int | None], ModelConfig]] = {
    **{
        f"{family}-{name}": partial(function, size)
        for family, function in (("kimi-linear", kimi_linear), ("gdn-hybrid", gdn_hybrid), ("full", full))
        for name, size in SIZES.items()
    },
    "kimi-linear-tiny-moe": kimi_linear_tiny_moe,
    "kimi-linear-48b-a3b": kimi_linear_48b_a3b,
}


def names() -> list[str]:
    """The presets there are."""
    return list(PRESETS)


def get(name: str, vocab_size: int | None = None, **changes: Any) -> ModelConfig:
    """The configuration of a preset.

    Args:
        vocab_size: tokens in the vocabulary; by default what suits the preset's size.
        changes: other fields of `ModelConfig` to change. The models of a size are matched before.

    Raises:
        ConfigError: there is no such preset, or a change cannot be right.
    """
    if name not in PRESETS:
        raise ConfigError(unknown(name, PRESETS, "preset"))
    config = PRESETS[name](vocab_size)
    return config.replace(**changes) if changes else config


def _mla(size: Size, rotate: bool) -> MLAConfig:
    return MLAConfig(
        num_heads=size.num_heads,
        kv_rank=size.kv_rank,
        nope_dim=size.head_dim,
        rope_dim=size.rope_dim,
        v_dim=size.head_dim,
        rotate=rotate,
    )


def _model(size: Size, vocab_size: int | None, **layers: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=size.vocab_size if vocab_size is None else vocab_size,
        d_model=size.d_model,
        depth=size.depth,
        feed_forward=FeedForwardConfig(size.d_hidden),
        **layers,
    )


def _matched(size: Size, config: ModelConfig) -> ModelConfig:
    return match_parameters(config, cost_of(kimi_linear(size)).non_embedding_parameters)
