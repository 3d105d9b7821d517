"""Ling and Ring linear 2.0: Lightning Attention as in Ling 2.5, and grouped attention with half of its channels rotated
where a group of layers ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.bailing_hybrid import expert_options
from intarsia.checkpoints.families.bailing_hybrid import feed_forward as feed_forward_rows
from intarsia.checkpoints.families.deepseek_v3 import experts_written
from intarsia.checkpoints.families.ling_lightning import (
    group_of,
    kinds_of,
    lightning_attention,
    lightning_options,
    lightning_written,
)
from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    PRE_NORMS,
    dense_layers,
    rotation_written,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, row, split, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import AttentionConfig, LightningConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

KINDS = {LightningConfig: LINEAR, AttentionConfig: FULL}
NAMES = {LINEAR: "lightning", FULL: "attention"}


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    for name in ("use_bias", "use_qkv_bias"):
        options.only(name, False, part="layers with biases in this family")
    for name in ("norm_head", "norm_softmax"):
        options.only(name, False, part="normed head or router of that kind")
    options.only("scoring_func", "sigmoid", part="router of that kind in this family")
    options.only("topk_method", "noaux_tc", part="choice of experts of that kind")
    for name in ("embedding_dropout", "output_dropout", "mtp_loss_scaling_factor", "num_mtp_layers"):
        options.maybe(name, float)  # of training
    for name in ("max_window_layers", "num_kv_heads_for_linear_attn", "rotary_dim", "linear_backend"):
        options.maybe(name, object)  # of no meaning in the released code
    options.presume(
        head_dim=128,
        rope_theta=600_000.0,
        partial_rotary_factor=0.5,
        num_experts=256,
        moe_intermediate_size=512,
    )
    depth, heads = options.get("num_hidden_layers", int), options.get("num_attention_heads", int)
    rotation = Rotation(options)
    lightning = lightning_options(options, rotation)
    attention = AttentionConfig(
        num_heads=heads,
        head_dim=lightning.head_dim,
        num_kv_heads=options.get("num_key_value_heads", int, heads),
        rope=lightning.rope,
        rope_theta=lightning.rope_theta,
        yarn=lightning.yarn,
        qk_norm="head" if lightning.qk_norm else "none",
    )
    kinds = kinds_of(depth, options.get("layer_group_size", int, 5))
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=depth,
        layout=" ".join(NAMES[kind] for kind in kinds),
        mixers={"lightning": lightning, "attention": attention},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 5120)),
        experts=expert_options(options),
        dense_layers=dense_layers(options, depth, 1),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    lightning, attention = only_mixer(config, LightningConfig), only_mixer(config, AttentionConfig)
    of, kinds = the_experts(config), names_of(config, KINDS)
    if attention.head_dim != lightning.head_dim or attention.num_heads != lightning.num_heads:
        raise UnsupportedError("the family's linear layers and its attention have the same heads")
    rope = rotation_written(attention.rope_theta, attention.yarn)
    theta = rope.pop("rope_theta")
    return {
        **sizes_of(config),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "rope_theta": theta,
        "rope_scaling": None if attention.yarn is None else rope,
        **lightning_written(lightning),
        "layer_group_size": group_of(kinds),
        "intermediate_size": config.feed_forward.d_hidden,
        "first_k_dense_replace": config.dense_layers,
        "score_function": "sigmoid",
        "num_experts": of.num_experts,
        "num_shared_experts": of.num_shared,
        **experts_written(of),
    }


def grouped_attention(config: AttentionConfig) -> Iterator[Row]:
    """All but the map of the output: queries, keys and values lie one behind the other."""
    wide, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    yield row(names, "query_key_value.weight", split(wide, keys, keys))
    if config.qk_norm == "head":
        yield from weights({"q_norm": "query_layernorm", "k_norm": "key_layernorm"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from weights({"embed": "model.word_embeddings", "norm": "model.norm"})
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        options = config.mixers[name]
        if isinstance(options, LightningConfig):
            mixer = lightning_attention(options)
        else:
            assert isinstance(options, AttentionConfig)
            mixer = grouped_attention(options)
        both = [*mixer, row("o_proj.weight", "dense.weight")]
        yield from under(f"{ours}mixer.", f"{theirs}attention.", both)
        yield from under(f"{ours}feed_forward.", f"{theirs}mlp.", feed_forward_rows(config, layer))


FAMILY = Family(
    name="bailing_moe_linear",
    title="Ling and Ring linear 2.0",
    model_types=("bailing_moe_linear", "bailing_moe_linear_v2"),
    architecture="BailingMoeLinearV2ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("lightning", "attention"),
    computed=(".slope",),
    oracle="the released code's equations, in float64",
)
