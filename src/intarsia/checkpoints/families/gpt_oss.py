"""gpt-oss: a window and full attention in turn, a sink a head, experts with biases; MXFP4 experts become floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints.families.parts import (
    FULL,
    PRE_NORMS,
    QKVO,
    SLIDING,
    listed_layers,
    outside,
    rotation_written,
    sizes_of,
    the_experts,
    yarn_options,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.mxfp4 import MXFP4
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import (
    TRANSPOSED,
    Either,
    Row,
    Transform,
    both,
    either,
    nothing,
    row,
    same,
    under,
    weights,
)
from intarsia.mixers import AttentionConfig, SlidingWindowConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.model.published import with_window

KINDS = {SlidingWindowConfig: SLIDING, AttentionConfig: FULL}


def _apart(x: Tensor) -> Tensor:
    return torch.cat([x[::2], x[1::2]])


def _in_turn(x: Tensor) -> Tensor:
    gate, up = x.chunk(2)
    return torch.stack([gate, up], dim=1).flatten(0, 1)


GATE_THEN_UP = Transform("gate and up in turn", lambda x: (_apart(x[0]),), lambda x: (_in_turn(x[0]),))
"""Rows of gate and up alternate there; the gate's come first here."""


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("swiglu_limit", 7.0, part="other limit of the clamped activation")
    options.only("swiglu_alpha", 1.702, part="other steepness of the clamped activation")
    if options.has("quantization_config"):
        weights_as = options.within("quantization_config")
        weights_as.only("quant_method", "mxfp4", part="weights of that format in this family")
        for name in ("modules_to_not_convert", "dequantize"):
            weights_as.maybe(name, object)
        weights_as.finish()
    depth = options.get("num_hidden_layers", int, 36)
    kinds = listed_layers(options, depth, [SLIDING if layer % 2 == 0 else FULL for layer in range(depth)])
    rotation = Rotation(options, theta=150000.0)
    options.maybe("initial_context_length", int)
    heads = options.get("num_attention_heads", int, 64)
    attention = AttentionConfig(
        num_heads=heads,
        head_dim=options.get("head_dim", int, 64),
        num_kv_heads=options.get("num_key_value_heads", int, 8),
        rope_theta=rotation.theta or 150000.0,
        yarn=yarn_options(rotation, 4096),
        sinks=True,
        bias=options.get("attention_bias", bool, True),
    )
    width = options.get("intermediate_size", int, 2880)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int, 2880),
        depth=depth,
        layout=layout_of(kinds, {SLIDING: "window", FULL: "attention"}, options),
        mixers={
            "window": with_window(attention, options.get("sliding_window", int, 128)),
            "attention": attention,
        },
        feed_forward=FeedForwardConfig(width),
        experts=ExpertsConfig(
            num_experts=options.get("num_local_experts", int, 128, "num_experts"),
            d_hidden=width,
            num_active=options.get("num_experts_per_tok", int, 4, "experts_per_token"),
            num_shared=0,
            scores="softmax",
            biases=True,
            activation="clamped",
            bias_update_rate=0,
        ),
        dense_layers=0,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-5),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    attention, window, of = (
        only_mixer(config, AttentionConfig),
        only_mixer(config, SlidingWindowConfig),
        the_experts(config),
    )
    return {
        **sizes_of(config),
        "layer_types": names_of(config, KINDS),
        "sliding_window": window.window,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "rope_parameters": rotation_written(attention.rope_theta, attention.yarn),
        "intermediate_size": of.d_hidden,
        "num_local_experts": of.num_experts,
        "num_experts_per_tok": of.num_active,
        "swiglu_limit": 7.0,
    }


def experts(config: ExpertsConfig) -> Iterator[Row | Either]:
    """Stacked, inputs first, as transformers has it; or in MXFP4, outputs first, as released."""
    floats, released = [], []
    for e in range(config.num_experts):
        up, down = f"experts.gate_up_proj[{e}]", f"experts.down_proj[{e}]"
        floats.append(row(f"gate_up[{e}]", up, both(TRANSPOSED, GATE_THEN_UP)))
        floats.append(row(f"down[{e}]", down, TRANSPOSED))
        blocks, scales = f"_blocks[{e}]", f"_scales[{e}]"
        both_of = tuple(f"experts.gate_up_proj{x}" for x in (blocks, scales))
        released.append(row(f"gate_up[{e}]", both_of, both(MXFP4, GATE_THEN_UP)))
        released.append(row(f"down[{e}]", tuple(f"experts.down_proj{x}" for x in (blocks, scales)), MXFP4))
        yield row(f"gate_up_bias[{e}]", f"experts.gate_up_proj_bias[{e}]", GATE_THEN_UP)
    yield either(floats, released)
    yield row("down_bias", "experts.down_proj_bias")
    yield from same({"router.weight": "router.weight", "router.logit_bias": "router.bias"})
    yield row("router.bias", (), nothing(config.num_experts))


def attention(config: AttentionConfig) -> Iterator[Row]:
    yield from weights(QKVO)
    yield from same({"sinks": "sinks"})
    if config.bias:
        yield from same(QKVO, ".bias")


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(
            ours + "mixer.", theirs + "self_attn.", attention(only_mixer(config, AttentionConfig))
        )
        yield from under(ours + "feed_forward.", theirs + "mlp.", experts(the_experts(config)))


FAMILY = Family(
    name="gpt_oss",
    title="gpt-oss-20b and 120b",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("window", "attention"),
    missing="writing MXFP4: experts are written as floats",
)
