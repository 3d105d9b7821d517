"""The shapes of published models, as functions of the vocabulary's size.

Their layers, dimensions, options and, to the last one, parameters are those of the published models. Their weights
are read by `intarsia.load`. What a published model has that is not in a shape (dropout, auxiliary losses, predicting
several tokens) is left out.
"""

from __future__ import annotations

import dataclasses
import math

from intarsia.layers.rope import Yarn
from intarsia.mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KDAConfig,
    LightningConfig,
    MLAConfig,
    SlidingWindowConfig,
)
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.qsa import QSAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, HyperConnectionsConfig, ModelConfig


def kimi_linear_48b_a3b(vocab_size: int = 163840) -> ModelConfig:
    """Kimi-Linear-48B-A3B (arXiv:2510.26692): 49.12 B parameters, of which 3.1 B compute a token.

    The routing weights are unbiased, as in the report. The code released with the weights adds the router's
    bias to them: `ExpertsConfig.routing_weights="biased"` does the same.
    """
    return ModelConfig(
        vocab_size=vocab_size,
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


def kimi_linear_48b_a3b_rope(vocab_size: int = 163840) -> ModelConfig:
    """The report's "Kimi Linear (RoPE)": the same with rotary positions in MLA, of Moonlight's base."""
    config = kimi_linear_48b_a3b(vocab_size)
    rotated = MLAConfig(32, 512, 128, 64, 128, rotate=True, rope_theta=50000.0)
    return config.replace(mixers={**config.mixers, "mla": rotated})


def moonlight_16b_a3b(vocab_size: int = 163840) -> ModelConfig:
    """Moonlight-16B-A3B (arXiv:2502.16982): MLA with RoPE in every layer, 16.0 B parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=2048,
        depth=27,
        layout="mla",
        mixers={"mla": MLAConfig(16, 512, 128, 64, 128, rotate=True, rope_theta=50000.0)},
        feed_forward=FeedForwardConfig(d_hidden=11264),
        experts=ExpertsConfig(
            num_experts=64, d_hidden=1408, num_active=6, num_shared=2, routed_scaling_factor=2.446
        ),
        tie_embeddings=False,
    )


def deepseek_v32(vocab_size: int = 129280) -> ModelConfig:
    """DeepSeek-V3.2 (arXiv:2512.02556): latent attention to 2048 tokens that an indexer picks, in every layer, 671.9 B
    parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=7168,
        depth=61,
        layout="dsa",
        mixers={
            "dsa": DSAConfig(
                128, 512, 128, 64, 128, q_rank=1536, rotate=True,
                yarn=Yarn(factor=40.0, original_length=4096, attention_factor=1.0), yarn_logits=1.0,
                index_heads=64, index_dim=128, top_k=2048,
            )
        },
        feed_forward=FeedForwardConfig(d_hidden=18432),
        experts=ExpertsConfig(
            num_experts=256, d_hidden=2048, num_active=8, routed_scaling_factor=2.5, num_groups=8,
            num_active_groups=4,
        ),
        dense_layers=3,
        tie_embeddings=False,
        norm_eps=1e-6,
    )  # fmt: skip


def glm_53_flash(vocab_size: int = 154880) -> ModelConfig:
    """GLM-5.3-Flash's text model: KDA 3 : latent attention without positions 1, to 2048 tokens in pools of 4 that an
    indexer picks; four residual streams; 313.3 B parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=4096,
        depth=45,
        layout="kda kda kda dsa",
        mixers={
            "kda": KDAConfig(64, 128, gate="bounded", gate_lower_bound=-5.0),
            "dsa": DSAConfig(
                64, 512, 256, 0, 256, q_rank=1536, rotate=False, latent_norm_eps=1e-5, index_heads=32,
                index_dim=128, top_k=2048, index_pool=4,
            ),
        },
        feed_forward=FeedForwardConfig(d_hidden=12288, limit=10.0),
        experts=ExpertsConfig(
            num_experts=288, d_hidden=2048, num_active=8, routed_scaling_factor=2.5, limit=10.0
        ),
        dense_layers=3,
        tie_embeddings=False,
        hyper_connections=HyperConnectionsConfig(streams=4),
    )  # fmt: skip


def qwen38_flash_next(vocab_size: int = 248320) -> ModelConfig:
    """Qwen3.8-Flash-Next's text model without its embedding of n-grams (51 B parameters in one layer): Gated DeltaNet
    3 : attention 1, to 2048 tokens in pools of 4 that an indexer picks; four residual streams, read through gates;
    125.7 B parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=2560,
        depth=48,
        layout="gdn*3 qsa",
        mixers={
            "gdn": GatedDeltaNetConfig(num_heads=16, head_dim=128, num_v_heads=48),
            "qsa": QSAConfig(
                24, 256, num_kv_heads=2, rope=0.25, rope_theta=10_000_000.0, qk_norm="head",
                zero_centered_qk_norm=True, output_gate=True, index_heads=4, index_dim=128, index_budget=2048,
                index_ratio=4,
            ),
        },
        feed_forward=FeedForwardConfig(d_hidden=640),
        experts=ExpertsConfig(
            num_experts=512, d_hidden=640, num_active=10, scores="softmax", shared_gate=True, bias_update_rate=0
        ),
        dense_layers=0,
        tie_embeddings=False,
        norm_eps=1e-6,
        zero_centered_norms=True,
        hyper_connections=HyperConnectionsConfig(streams=4, rank=320),
    )  # fmt: skip


def minicpm_sala(vocab_size: int = 73448) -> ModelConfig:
    """MiniCPM-SALA (arXiv:2602.11761): Lightning with RoPE 24 : InfLLM-v2 without positions 8, 9.5 B parameters. Of the
    blocks that a token reads 64 are chosen beside those of its window."""
    sparse = {0, 9, 16, 17, 22, 29, 30, 31}
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=4096,
        depth=32,
        layout=" ".join("infllm2" if layer in sparse else "lightning" for layer in range(32)),
        mixers={
            "infllm2": InfLLM2Config(32, 128, num_kv_heads=2, rope=0.0, output_gate=True, topk=64 + 32),
            "lightning": LightningConfig(
                32, 128, decay_factor=1.0, silu=False, qk_norm=True, rope=1.0, scale=128**-0.5
            ),
        },
        feed_forward=FeedForwardConfig(d_hidden=16384),
        tie_embeddings=False,
        norm_eps=1e-6,
        embed_scale=12.0,
        branch_scale=1.4 / math.sqrt(32),
        head_scale=256 / 4096,
    )


def minimax_text_01(vocab_size: int = 200064) -> ModelConfig:
    """MiniMax-Text-01 (arXiv:2501.08313): Lightning 7 : softmax 1, 456 B parameters. The residual stream carries the
    normed input times a factor. Attention rotates half of the channels, as the released code does; transformers 5.23
    ignores that factor and rotates all."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=6144,
        depth=80,
        layout="lightning*7 attention",
        mixers={
            "lightning": LightningConfig(num_heads=64, head_dim=128, norm_eps=1e-6),
            "attention": AttentionConfig(64, 128, num_kv_heads=8, rope=0.5, rope_theta=10_000_000.0),
        },
        feed_forward=FeedForwardConfig(d_hidden=9216),
        experts=ExpertsConfig(
            num_experts=32, d_hidden=9216, num_active=2, num_shared=0, scores="softmax", bias_update_rate=0
        ),
        dense_layers=0,
        tie_embeddings=False,
        norm_placement="stream",
        residual_scale=3.5565588200778455,
    )


def qwen3_next_80b_a3b(vocab_size: int = 151936) -> ModelConfig:
    """Qwen3-Next-80B-A3B: Gated DeltaNet 3 : gated attention 1 with a quarter of the channels rotated, 79.7 B
    parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=2048,
        depth=48,
        layout="gdn*3 attention",
        mixers={
            "gdn": GatedDeltaNetConfig(num_heads=16, head_dim=128, num_v_heads=32),
            "attention": AttentionConfig(
                16, 256, num_kv_heads=2, rope=0.25, rope_theta=10_000_000.0, qk_norm="head",
                zero_centered_qk_norm=True, output_gate=True,
            ),
        },
        feed_forward=FeedForwardConfig(d_hidden=5632),
        experts=ExpertsConfig(
            num_experts=512, d_hidden=512, num_active=10, scores="softmax", shared_gate=True, bias_update_rate=0
        ),
        dense_layers=0,
        tie_embeddings=False,
        norm_eps=1e-6,
        zero_centered_norms=True,
    )  # fmt: skip


def gpt_oss_120b(vocab_size: int = 201088) -> ModelConfig:
    """gpt-oss-120b (arXiv:2508.10925): a window of 128 tokens and full attention in turn, a sink a head, 116.8 B
    parameters."""
    attention = AttentionConfig(
        64, 64, num_kv_heads=8, rope_theta=150000.0, sinks=True, bias=True,
        yarn=Yarn(factor=32.0, original_length=4096, truncate=False),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=2880,
        depth=36,
        layout="window attention",
        mixers={"window": with_window(attention, 128), "attention": attention},
        feed_forward=FeedForwardConfig(d_hidden=2880),
        experts=ExpertsConfig(
            num_experts=128, d_hidden=2880, num_active=4, num_shared=0, scores="softmax", biases=True,
            activation="clamped", bias_update_rate=0,
        ),
        dense_layers=0,
        tie_embeddings=False,
    )  # fmt: skip


def gpt_oss_20b(vocab_size: int = 201088) -> ModelConfig:
    """gpt-oss-20b: 24 layers with 32 experts each, 20.9 B parameters."""
    config = gpt_oss_120b(vocab_size)
    assert config.experts is not None
    return config.replace(depth=24, experts=dataclasses.replace(config.experts, num_experts=32))


def olmo_hybrid_7b(vocab_size: int = 100352) -> ModelConfig:
    """OLMo-Hybrid-7B: Gated DeltaNet 3 : attention 1, beta up to 2, the norms of attention blocks after, 7.4 B
    parameters. The release drops the rotation for long contexts: `rope=0` in its attention."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=3840,
        depth=32,
        layout="gdn*3 attention",
        mixers={
            "gdn": GatedDeltaNetConfig(30, 96, head_v_dim=192, negative_eigenvalues=True, norm_eps=1e-5),
            "attention": AttentionConfig(30, 128, rope_theta=500000.0, qk_norm="channels"),
        },
        feed_forward=FeedForwardConfig(d_hidden=11008),
        tie_embeddings=False,
        norm_eps=1e-6,
        norm_placement={"attention": "after"},
    )


def with_window(attention: AttentionConfig, window: int) -> SlidingWindowConfig:
    """The same attention to the last `window` tokens alone."""
    options = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
    return SlidingWindowConfig(**options, window=window)


PUBLISHED = {
    "kimi-linear": kimi_linear_48b_a3b,
    "kimi-linear-48b-a3b": kimi_linear_48b_a3b,
    "kimi-linear-rope": kimi_linear_48b_a3b_rope,
    "moonlight": moonlight_16b_a3b,
    "deepseek-v3.2": deepseek_v32,
    "glm-5.3-flash": glm_53_flash,
    "qwen3.8-flash-next": qwen38_flash_next,
    "minicpm-sala": minicpm_sala,
    "minimax-01": minimax_text_01,
    "qwen3-next": qwen3_next_80b_a3b,
    "gpt-oss": gpt_oss_120b,
    "gpt-oss-20b": gpt_oss_20b,
    "olmo-hybrid": olmo_hybrid_7b,
}
"""By the names that `intarsia presets` shows. The functions have the models' full names, since the families of
`presets.py` have the short ones."""
