"""Named models. Each is a function of the vocabulary's size; `get("kimi-linear-tiny")` calls one by name.

Families in four sizes, made to be compared: in a size, all have the same width, depth and heads, and
the feed-forward of the others is changed until they have as many parameters as Kimi Linear
(`match_parameters`), embedding and head not counted.

| family | layers | position |
| --- | --- | --- |
| `kimi-linear` | KDA 3 : MLA 1 | none in MLA |
| `kimi-linear-rope` | KDA 3 : MLA 1 | RoPE in MLA |
| `gdn-hybrid` | Gated DeltaNet 3 : MLA 1 | RoPE in MLA |
| `full` | MLA everywhere | RoPE |
| `qwen3-next` | Gated DeltaNet 3 : gated attention 1 | RoPE on a quarter of the channels |
| `olmo-hybrid` | Gated DeltaNet 3 : attention 1, norms after attention | RoPE |
| `gpt-oss` | window 1 : attention 1, with sinks | RoPE |
| `minimax-01` | Lightning 7 : attention 1, norms in the stream; not in the two sizes with 4 layers | RoPE on half |
| `deepseek-v3.2` | MLA everywhere, to 256 tokens that an indexer picks | RoPE |
| `glm-5.3-flash` | KDA 3 : MLA 1, to 256 tokens in pools of 4; four residual streams | none in MLA |
| `qwen3.8-flash-next` | Gated DeltaNet 3 : gated attention 1, as before; four gated streams | RoPE on a quarter |
| `minicpm-sala` | Lightning 3 : attention 1, to 8 blocks of 32 tokens | RoPE in Lightning |

The same names without a size are the published shapes, in `published.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from intarsia.errors import ConfigError, OptionError
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, KDAConfig, LightningConfig, MLAConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.qsa import QSAConfig
from intarsia.model.config import (
    ExpertsConfig,
    FeedForwardConfig,
    HyperConnectionsConfig,
    ModelConfig,
    unknown,
)
from intarsia.model.language_model import cost_of
from intarsia.model.matching import match_parameters
from intarsia.model.published import PUBLISHED, with_window
from intarsia.settings import merge


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


def kimi_linear_rope(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """The report's Kimi Linear with rotary positions in MLA."""
    mixers = {"kda": KDAConfig(size.num_heads, size.head_dim), "mla": _mla(size, rotate=True)}
    return _model(size, vocab_size, layout="kda kda kda mla", mixers=mixers)


def qwen3_next(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """Qwen3-Next's layers, dense: two value heads to a key head, attention with half as many heads twice as wide."""
    H, K = size.num_heads, size.head_dim
    attention = AttentionConfig(
        max(1, H // 2), 2 * K, num_kv_heads=1, rope=0.25, qk_norm="head", zero_centered_qk_norm=True,
        output_gate=True,
    )  # fmt: skip
    mixers = {"gdn": GatedDeltaNetConfig(max(1, H // 2), K, num_v_heads=H), "attention": attention}
    layers = {
        "layout": "gdn gdn gdn attention",
        "mixers": mixers,
        "zero_centered_norms": True,
        "norm_eps": 1e-6,
    }
    return _matched(size, _model(size, vocab_size, **layers))


def olmo_hybrid(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """OLMo-Hybrid's layers: values twice as wide as keys, beta up to 2, norms after attention."""
    H, K = size.num_heads, size.head_dim
    mixers = {
        "gdn": GatedDeltaNetConfig(
            H, K * 3 // 4, head_v_dim=K * 3 // 2, negative_eigenvalues=True, norm_eps=1e-5
        ),
        "attention": AttentionConfig(H, K, qk_norm="channels"),
    }
    layers = {"layout": "gdn gdn gdn attention", "mixers": mixers, "norm_eps": 1e-6}
    return _matched(size, _model(size, vocab_size, **layers, norm_placement={"attention": "after"}))


def gpt_oss(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """gpt-oss's layers, dense: a window of 128 tokens and full attention in turn, with sinks and biases."""
    attention = AttentionConfig(
        size.num_heads, size.head_dim, num_kv_heads=max(1, size.num_heads // 4), sinks=True, bias=True
    )
    mixers = {"window": with_window(attention, 128), "attention": attention}
    return _matched(size, _model(size, vocab_size, layout="window attention", mixers=mixers))


def minimax_01(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """MiniMax-01's layers, dense, with its factor of the residual stream; the depth must hold its period of 8."""
    H, K = size.num_heads, size.head_dim
    mixers = {
        "lightning": LightningConfig(H, K, norm_eps=1e-6),
        "attention": AttentionConfig(H, K, num_kv_heads=max(1, H // 8), rope=0.5),
    }
    # The published factor grows with the depth, (2 · 80) ** 0.25.
    layers = {"norm_placement": "stream", "residual_scale": (2 * size.depth) ** 0.25, "mixers": mixers}
    return _matched(size, _model(size, vocab_size, layout="lightning*7 attention", **layers))


def deepseek_v32(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """DeepSeek-V3.2's layers, dense."""
    dsa = _dsa(size, rotate=True, q_rank=2 * size.kv_rank)
    return _matched(size, _model(size, vocab_size, layout="dsa", mixers={"dsa": dsa}, norm_eps=1e-6))


def glm_53_flash(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """GLM-5.3-Flash's layers, dense."""
    kda = KDAConfig(size.num_heads, size.head_dim, gate="bounded", gate_lower_bound=-5.0)
    latent = {"rope_dim": 0, "q_rank": 2 * size.kv_rank, "latent_norm_eps": 1e-5, "index_pool": 4}
    mixers = {"kda": kda, "dsa": _dsa(size, rotate=False, **latent)}
    streams = HyperConnectionsConfig(streams=4)
    layers = {"layout": "kda kda kda dsa", "mixers": mixers, "hyper_connections": streams}
    config = _model(size, vocab_size, **layers)
    return _matched(size, config.replace(feed_forward=FeedForwardConfig(size.d_hidden, limit=10.0)))


def qwen38_flash_next(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """Qwen3.8-Flash-Next's layers, dense, without its embedding of n-grams."""
    H, K = size.num_heads, size.head_dim
    qsa = QSAConfig(
        max(1, H // 2), 2 * K, num_kv_heads=1, rope=0.25, qk_norm="head", zero_centered_qk_norm=True,
        output_gate=True, index_heads=4, index_dim=K, index_budget=256, index_ratio=4,
    )  # fmt: skip
    mixers = {"gdn": GatedDeltaNetConfig(max(1, H // 2), K, num_v_heads=H), "qsa": qsa}
    streams = HyperConnectionsConfig(streams=4, rank=size.d_model // 8)
    layers = {
        "layout": "gdn gdn gdn qsa",
        "mixers": mixers,
        "zero_centered_norms": True,
        "norm_eps": 1e-6,
        "hyper_connections": streams,
    }
    return _matched(size, _model(size, vocab_size, **layers))


def minicpm_sala(size: Size, vocab_size: int | None = None) -> ModelConfig:
    """MiniCPM-SALA's layers in periods of four, without its factors."""
    H, K = size.num_heads, size.head_dim
    mixers = {
        "lightning": LightningConfig(
            H, K, decay_factor=1.0, silu=False, qk_norm=True, rope=1.0, scale=K**-0.5
        ),
        "infllm2": InfLLM2Config(
            H,
            K,
            num_kv_heads=max(1, H // 8),
            rope=0.0,
            output_gate=True,
            block_size=32,
            window_size=128,
            topk=8,
        ),
    }
    layers = {"layout": "lightning*3 infllm2", "mixers": mixers, "norm_eps": 1e-6}
    return _matched(size, _model(size, vocab_size, **layers))


def _published(function: Callable[..., ModelConfig], vocab_size: int | None) -> ModelConfig:
    return function() if vocab_size is None else function(vocab_size)


def kimi_linear_tiny_moe(vocab_size: int | None = None) -> ModelConfig:
    """`kimi-linear-tiny` with 16 experts, 3 of them and a shared one active, in all layers but the first."""
    size = SIZES["tiny"]
    experts = ExpertsConfig(
        num_experts=16, d_hidden=size.d_hidden // 4, num_active=3, routed_scaling_factor=2.446
    )
    return kimi_linear(size, vocab_size).replace(experts=experts)


FAMILIES: dict[str, Callable[[Size, int | None], ModelConfig]] = {
    "kimi-linear": kimi_linear,
    "kimi-linear-rope": kimi_linear_rope,
    "gdn-hybrid": gdn_hybrid,
    "full": full,
    "qwen3-next": qwen3_next,
    "olmo-hybrid": olmo_hybrid,
    "gpt-oss": gpt_oss,
    "minimax-01": minimax_01,
    "deepseek-v3.2": deepseek_v32,
    "glm-5.3-flash": glm_53_flash,
    "qwen3.8-flash-next": qwen38_flash_next,
    "minicpm-sala": minicpm_sala,
}

PERIODS = {"minimax-01": 8}
"""The depths that a family needs a multiple of, where some sizes are not."""

PRESETS: dict[str, Callable[[int | None], ModelConfig]] = {
    **{
        f"{family}-{name}": partial(function, size)
        for family, function in FAMILIES.items()
        for name, size in SIZES.items()
        if size.depth % PERIODS.get(family, 1) == 0
    },
    "kimi-linear-tiny-moe": kimi_linear_tiny_moe,
    **{name: partial(_published, function) for name, function in PUBLISHED.items()},
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


def configure(preset: str | None, changes: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """A preset with changes, table by table; without a preset the changes are the whole configuration.

    Args:
        vocab_size: tokens of the tokenizer, which is not to be changed.

    Raises:
        OptionError: there is no such preset, or an option cannot be right; with its path in `changes`.
    """
    base: Mapping[str, Any] = {"vocab_size": vocab_size}
    if preset is not None:
        base = get(preset, vocab_size=vocab_size).to_dict()
    if changes.get("vocab_size", vocab_size) != vocab_size:
        raise OptionError(
            f"must be that of the tokenizer, {vocab_size}; got {changes['vocab_size']}", ("vocab_size",)
        )
    return ModelConfig.from_dict(merge(base, changes))


def _mla(size: Size, rotate: bool) -> MLAConfig:
    return MLAConfig(
        num_heads=size.num_heads,
        kv_rank=size.kv_rank,
        nope_dim=size.head_dim,
        rope_dim=size.rope_dim,
        v_dim=size.head_dim,
        rotate=rotate,
    )


def _dsa(size: Size, rotate: bool, **options: Any) -> DSAConfig:
    """As `_mla`, to 256 tokens. 16 index heads: of fewer, all products may be negative, and then nothing is chosen by
    them."""
    mla = _mla(size, rotate)
    latent = {field.name: getattr(mla, field.name) for field in dataclasses.fields(mla)}
    indexer = {"top_k": 256, "index_heads": 16, "index_dim": max(32, size.rope_dim)}
    return DSAConfig(**{**latent, **indexer, **options})


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
