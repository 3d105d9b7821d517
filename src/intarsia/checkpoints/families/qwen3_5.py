"""Qwen3.5, 3.6 and 3.8, the dense ones: Gated DeltaNet 3 : gated attention 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    MTP,
    PRE_NORMS,
    QK_NORMS,
    SWIGLU,
    VISION,
    gated_delta_written,
    layers_by_interval,
    outside,
    share_of,
    sizes_of,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import CONVOLUTION, Either, Row, grouped, row, same, split, under, weights
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, MixerConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

KINDS: Mapping[type[MixerConfig], str] = {GatedDeltaNetConfig: LINEAR, AttentionConfig: FULL}


def linear_options(options: Options, key_heads: int = 16, value_heads: int = 32) -> GatedDeltaNetConfig:
    """The Gated DeltaNet layers of all Qwen models."""
    return GatedDeltaNetConfig(
        num_heads=options.get("linear_num_key_heads", int, key_heads),
        head_dim=options.get("linear_key_head_dim", int, 128),
        num_v_heads=options.get("linear_num_value_heads", int, value_heads),
        head_v_dim=options.get("linear_value_head_dim", int, 128),
        conv_size=options.get("linear_conv_kernel_dim", int, 4),
    )


def attention_options(options: Options) -> AttentionConfig:
    """Their attention: each channel gated, a norm of each head, a quarter of the channels rotated."""
    options.only("attn_output_gate", True, part="attention of this family without its output gate")
    rotation = Rotation(options, share=0.25)
    # Sections of positions in pictures: of a text all of them are the same number.
    rotation.more.maybe("mrope_section", list)
    rotation.more.maybe("mrope_interleaved", bool)
    rotation.plain()
    head_dim = options.get("head_dim", int, 256)
    return AttentionConfig(
        num_heads=options.get("num_attention_heads", int),
        head_dim=head_dim,
        num_kv_heads=options.get("num_key_value_heads", int),
        rope=int(head_dim * rotation.share) / head_dim,
        rope_theta=rotation.theta or 10000.0,
        qk_norm="head",
        zero_centered_qk_norm=True,
        output_gate=True,
        bias=options.get("attention_bias", bool, False),
    )


def common(options: Options) -> dict[str, Any]:
    """What of a configuration does not depend on the feed-forward."""
    options.only("hidden_act", "silu", part="activation of that name")
    kinds = layers_by_interval(options, 4)
    return {
        "vocab_size": options.get("vocab_size", int),
        "d_model": options.get("hidden_size", int),
        "depth": len(kinds),
        "layout": layout_of(kinds, {LINEAR: "gdn", FULL: "attention"}, options),
        "mixers": {"gdn": linear_options(options), "attention": attention_options(options)},
        "tie_embeddings": options.get("tie_word_embeddings", bool, False),
        "norm_eps": options.get("rms_norm_eps", float, 1e-6),
        "zero_centered_norms": True,
    }


def read(options: Options) -> ModelConfig:
    options.only("mlp_only_layers", [], part="choice of layers with experts")
    return ModelConfig(
        **common(options), feed_forward=FeedForwardConfig(options.get("intermediate_size", int))
    )


def common_written(config: ModelConfig, kinds: Mapping[type[MixerConfig], str] = KINDS) -> dict[str, Any]:
    """`common` the other way round; `kinds` are the two of layers."""
    linear, full = kinds
    names = names_of(config, kinds)
    gdn, attention = only_mixer(config, linear), only_mixer(config, full)
    assert isinstance(gdn, GatedDeltaNetConfig)
    assert isinstance(attention, AttentionConfig)
    return {
        **sizes_of(config),
        "layer_types": names,
        **gated_delta_written(gdn),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": share_of(attention.rotated, attention.head_dim),
        },
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {**common_written(config), "intermediate_size": config.feed_forward.d_hidden}


def gated_attention(config: AttentionConfig) -> Iterator[Row]:
    """In `q_proj` each head's gate lies behind its query."""
    for kind in ("weight", "bias") if config.bias else ("weight",):
        both = (f"q_proj.{kind}", f"output_gate_proj.{kind}")
        yield row(both, f"q_proj.{kind}", grouped(config.num_heads, config.head_dim, config.head_dim))
        yield from same({name: name for name in ("k_proj", "v_proj", "o_proj")}, f".{kind}")
    yield from weights(QK_NORMS)


def gated_delta_net(config: GatedDeltaNetConfig) -> Iterator[Row]:
    keys, values = config.num_heads * config.head_dim, config.value_heads * config.value_dim
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    yield row(names, "in_proj_qkv.weight", split(keys, keys, values))
    yield from weights({"output_gate_proj": "in_proj_z", "beta_proj": "in_proj_b", "decay_proj": "in_proj_a"})
    yield from gated_delta_rest()


def gated_delta_rest() -> Iterator[Row]:
    """What is the same in Qwen3-Next."""
    yield row("conv.weight", "conv1d.weight", CONVOLUTION)
    yield from same({"decay.A_log": "A_log", "decay.dt_bias": "dt_bias"})
    yield from weights({"norm": "norm", "o_proj": "out_proj"})


def mixers(
    config: ModelConfig,
    layer: int,
    delta: Callable[[GatedDeltaNetConfig], Iterator[Row]] = gated_delta_net,
    norms: Mapping[str, str] = PRE_NORMS,
) -> Iterator[Row | Either]:
    """Norms and mixer of a layer; `delta` has the names of Gated DeltaNet."""
    ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
    yield from under(ours, theirs, weights(norms))
    options = config.mixers[config.layers[layer]]
    if isinstance(options, AttentionConfig):
        yield from under(ours + "mixer.", theirs + "self_attn.", gated_attention(options))
    elif isinstance(options, GatedDeltaNetConfig):
        yield from under(ours + "mixer.", theirs + "linear_attn.", delta(options))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        yield from mixers(config, layer)
        yield from under(f"blocks.{layer}.feed_forward.", f"model.layers.{layer}.mlp.", weights(SWIGLU))


FAMILY = Family(
    name="qwen3_5_text",
    title="Qwen3.5, 3.6, 3.8",
    model_types=("qwen3_5_text", "qwen3_5"),
    architecture="Qwen3_5ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("gdn", "attention"),
    left_out={**VISION, **MTP},
)
