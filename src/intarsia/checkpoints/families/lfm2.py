"""LFM2: gated short convolutions, and attention in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import FULL, listed_layers, outside
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import CONVOLUTION, Either, Row, row, same, split, under, weights
from intarsia.mixers import AttentionConfig, GatedConvolutionConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

CONV = "conv"
KINDS = {GatedConvolutionConfig: CONV, AttentionConfig: FULL}
NORMS = {"mixer_norm": "operator_norm", "feed_forward_norm": "ffn_norm"}
ATTENTION = {
    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj",
    "q_norm": "q_layernorm", "k_norm": "k_layernorm",
}  # fmt: skip
FEED_FORWARD = {"gate": "w1", "up": "w3", "down": "w2"}
GATES = ("input_gate_proj", "output_gate_proj", "v_proj")


def layer_types(options: Options) -> list[str]:
    """`layer_types`, or the older `full_attn_idxs`; attention in all layers where there is neither."""
    depth = options.get("num_hidden_layers", int, 32)
    indices: list[int] = options.get("full_attn_idxs", list, list(range(depth)))
    return listed_layers(options, depth, [FULL if layer in indices else CONV for layer in range(depth)])


def width(options: Options) -> int:
    """Of the feed-forward: what is given is two thirds more, and rounded up to a multiple, unless that is off."""
    given = options.get("intermediate_size", int, 12288, "block_ff_dim")
    factor = options.get("block_ffn_dim_multiplier", float, 1.0)
    multiple = options.get("block_multiple_of", int, 256)
    if not options.get("block_auto_adjust_ff_dim", bool, True):
        return given
    return -(-int(factor * int(2 * given / 3)) // multiple) * multiple


def common(options: Options) -> dict[str, Any]:
    """What of a configuration does not depend on the feed-forward."""
    kinds = layer_types(options)
    d_model, heads = options.get("hidden_size", int, 2560), options.get("num_attention_heads", int, 32)
    rotation = Rotation(options, theta=1e6)
    rotation.plain()
    attention = AttentionConfig(
        num_heads=heads,
        head_dim=options.get("head_dim", int, d_model // heads),
        num_kv_heads=options.get("num_key_value_heads", int, 8),
        rope=rotation.share,
        rope_theta=rotation.theta or 1e6,
        qk_norm="head",
    )
    convolution = GatedConvolutionConfig(
        conv_size=options.get("conv_L_cache", int, 3), bias=options.get("conv_bias", bool, False)
    )
    return {
        "vocab_size": options.get("vocab_size", int, 65536),
        "d_model": d_model,
        "depth": len(kinds),
        "layout": layout_of(kinds, {CONV: "conv", FULL: "attention"}, options),
        "mixers": {"conv": convolution, "attention": attention},
        "tie_embeddings": options.get("tie_word_embeddings", bool, True, "tie_embedding"),
        "norm_eps": options.get("norm_eps", float, 1e-5, "block_norm_eps"),
    }


def read(options: Options) -> ModelConfig:
    made = common(options)
    d_model, heads = made["d_model"], made["mixers"]["attention"].num_heads
    options.only("use_pos_enc", True, part="attention of this family without positions")
    for name in ("block_dim", "conv_dim", "conv_dim_out"):  # of the first code: all the same as the width
        options.only(name, d_model, part="convolution of another width")
    options.only("num_heads", heads, part="other number of heads under that name")
    options.only("block_use_swiglu", True, part="feed-forward of this family without gate")
    for name in ("block_mlp_init_scale", "block_out_init_scale"):  # of the first weights, as the next
        options.maybe(name, float)
    for name in ("block_use_xavier_init", "conv_use_xavier_init"):
        options.maybe(name, bool)
    return ModelConfig(**made, feed_forward=FeedForwardConfig(width(options)))


def common_written(config: ModelConfig) -> dict[str, Any]:
    """`common` the other way round."""
    convolution, attention = only_mixer(config, GatedConvolutionConfig), only_mixer(config, AttentionConfig)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.depth,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "intermediate_size": config.feed_forward.d_hidden,
        "layer_types": names_of(config, KINDS),
        "conv_L_cache": convolution.conv_size,
        "conv_bias": convolution.bias,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {**common_written(config), "block_auto_adjust_ff_dim": False}


def convolution(config: GatedConvolutionConfig, d_model: int) -> Iterator[Row]:
    for kind in ("weight", "bias") if config.bias else ("weight",):
        together = split(d_model, d_model, d_model)
        yield row(tuple(f"{name}.{kind}" for name in GATES), f"in_proj.{kind}", together)
        yield from same({"o_proj": "out_proj"}, f".{kind}")
    yield row("conv.weight", "conv.weight", CONVOLUTION)
    if config.bias:
        yield row("conv.bias", "conv.bias")


def mixers(config: ModelConfig) -> Iterator[Row | Either]:
    """All but the feed-forwards."""
    yield from outside(config, norm="embedding_norm")
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(NORMS))
        options = config.mixers[config.layers[layer]]
        if isinstance(options, GatedConvolutionConfig):
            yield from under(ours + "mixer.", theirs + "conv.", convolution(options, config.d_model))
        else:
            yield from under(ours + "mixer.", theirs + "self_attn.", weights(ATTENTION))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from mixers(config)
    for layer in range(config.depth):
        name = f"{layer}.feed_forward."
        yield from under(f"blocks.{name}", f"model.layers.{name}", weights(FEED_FORWARD))


FAMILY = Family(
    name="lfm2",
    title="LFM2",
    model_types=("lfm2",),
    architecture="Lfm2ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("conv", "attention"),
)
