"""MiniMax-M2: softmax attention in every layer, half of its channels rotated, and experts by sigmoid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import (
    PRE_NORMS,
    QK_NORMS,
    QKVO,
    block_of_experts,
    outside,
    share_of,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, row, under, weights
from intarsia.mixers import AttentionConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig


def attention_options(options: Options, theta: float, head_dim: int, **more: Any) -> AttentionConfig:
    """The attention of all MiniMax models. The releases say `rotary_dim`, a number of channels."""
    options.only("sliding_window", part="window in this family")
    rotation = Rotation(options, theta)
    rotation.plain()
    share = int(head_dim * rotation.share)
    rotated = options.get("rotary_dim", int, share)
    if rotated != share and rotation.share != 1:  # which is nothing said
        raise options.unsupported(f"rotary_dim is {rotated}, and partial_rotary_factor {rotation.share}")
    heads = options.get("num_attention_heads", int)
    return AttentionConfig(
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=options.get("num_key_value_heads", int, 8),
        rope=rotated / head_dim,
        rope_theta=rotation.theta or theta,
        **more,
    )


def attention_written(config: AttentionConfig) -> dict[str, Any]:
    """`attention_options` the other way round."""
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotated,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": share_of(config.rotated, config.head_dim),
        },
    }


def no_shared_experts(options: Options) -> None:
    """What the releases of MiniMax say of experts that they do not have."""
    options.only("shared_intermediate_size", 0, part="shared experts in this family")
    options.maybe("shared_moe_mode", str)  # of the shared ones


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("scoring_func", "sigmoid", part="router of that kind in this family")
    options.only("use_routing_bias", True, part="router without a correcting bias in this family")
    options.only("use_qk_norm", True, part="attention without norms of queries and keys in this family")
    options.only("qk_norm_type", "per_layer", part="norm of queries and keys of that kind in this family")
    options.only("routed_scaling_factor", 1, part="factor of experts in this family")
    for kind in ("full_attention", "linear_attention", "mlp"):
        options.only(f"layernorm_{kind}_beta", 1, part="factor of a layer's output")
    no_shared_experts(options)
    for name in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mlp_intermediate_size"):
        options.maybe(name, object)  # of what is not in the files
    depth = options.get("num_hidden_layers", int, 62)
    options.only("attn_type_list", [1] * depth, part="linear attention in this family")
    options.only("layer_types", ["full_attention"] * depth, part="linear attention in this family")
    hidden = options.get("intermediate_size", int, 1536)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=depth,
        layout="attention",
        mixers={
            "attention": attention_options(
                options, 5_000_000.0, options.get("head_dim", int, 128), qk_norm="channels"
            )
        },
        feed_forward=FeedForwardConfig(hidden),
        experts=ExpertsConfig(
            num_experts=options.get("num_local_experts", int, 256, "num_experts"),
            d_hidden=hidden,
            num_active=options.get("num_experts_per_tok", int, 8),
            num_shared=0,
        ),
        dense_layers=0,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    names_of(config, {AttentionConfig: "attention"})
    of = the_experts(config)
    return {
        **sizes_of(config),
        **attention_written(only_mixer(config, AttentionConfig)),
        "intermediate_size": of.d_hidden,
        "num_local_experts": of.num_experts,
        "num_experts_per_tok": of.num_active,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
    }


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    of = the_experts(config)
    router = [row("router.weight", "gate.weight"), row("router.bias", "e_score_correction_bias")]
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours + "mixer.", theirs + "self_attn.", weights({**QKVO, **QK_NORMS}))
        yield from under(ours + "feed_forward.", theirs, block_of_experts(of, router))


FAMILY = Family(
    name="minimax_m2",
    title="MiniMax-M2",
    model_types=("minimax_m2",),
    architecture="MiniMaxM2ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("attention",),
)
