"""Granite 4.0: Mamba-2 and a little attention, a factor at each turn, experts beside a shared one or that one alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.mamba2 import heads_options, heads_written, state_space
from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    PRE_NORMS,
    QKVO,
    listed_layers,
    outside,
    read_as,
    rotation_written,
    sizes_of,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, either, nothing, row, same, split, under
from intarsia.mixers import AttentionConfig, Mamba2Config
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

KINDS = {Mamba2Config: LINEAR, AttentionConfig: FULL}
NAMES = {LINEAR: "mamba2", FULL: "attention", "mamba": "mamba2", "attention": "attention"}
ROUTED = {
    "gate_up": "input_linear.weight",
    "down": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
"""As released; transformers' modules call them as follows."""
MODULES = {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj", "router.weight": "router.weight"}


def state_space_options(options: Options, d_model: int) -> Mamba2Config:
    inner = options.get("mamba_expand", int, 2) * d_model
    return Mamba2Config(**heads_options(options, inner, "mamba_expand times hidden_size"))


def attention_options(options: Options, d_model: int) -> AttentionConfig:
    options.only("position_embedding_type", "rope", "nope", part="positions of that kind")
    rotation = Rotation(options)
    rotation.plain()
    heads = options.get("num_attention_heads", int, 32)
    return AttentionConfig(
        num_heads=heads,
        head_dim=d_model // heads,
        num_kv_heads=options.get("num_key_value_heads", int, heads),
        rope=rotation.share if options.values.get("position_embedding_type") == "rope" else 0.0,
        rope_theta=rotation.theta or 10000.0,
        bias=options.get("attention_bias", bool, False),
        scale=options.get("attention_multiplier", float, 1.0),
    )


def expert_options(options: Options, shared: int) -> ExpertsConfig | None:
    """None for the models that have only the shared expert."""
    number, inside = options.get("num_local_experts", int, 8), options.get("intermediate_size", int, 11008)
    active = options.get("num_experts_per_tok", int, 2)
    if not number:
        return None
    return ExpertsConfig(number, inside, active, d_shared=shared, scores="softmax")


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("normalization_function", "rmsnorm", part="norm of that name")
    options.maybe("init_method", str)
    depth, d_model = options.get("num_hidden_layers", int, 32), options.get("hidden_size", int, 4096)
    if "layers_block_type" in options.values:
        options.presume(layer_types=options.maybe("layers_block_type", list))
    kinds = listed_layers(options, depth, [LINEAR] * depth)
    shared = options.get("shared_intermediate_size", int, 1024)
    mixers = {
        "mamba2": state_space_options(options, d_model),
        "attention": attention_options(options, d_model),
    }
    layout = layout_of(kinds, NAMES, options)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 32000),
        d_model=d_model,
        depth=depth,
        layout=layout,
        mixers={name: mixer for name, mixer in mixers.items() if name in layout.split()},
        feed_forward=FeedForwardConfig(shared),
        experts=expert_options(options, shared),
        dense_layers=0,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        embed_scale=options.get("embedding_multiplier", float, 1.0),
        branch_scale=options.get("residual_multiplier", float, 1.0),
        head_scale=1 / options.get("logits_scaling", float, 1.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kinds = names_of(config, KINDS)
    of = config.experts
    values = {
        **sizes_of(config),
        "layer_types": kinds,
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.branch_scale,
        "logits_scaling": read_as(config.head_scale, 1 / config.head_scale, lambda x: 1 / x),
        "num_local_experts": 0 if of is None else of.num_experts,
        "num_experts_per_tok": 0 if of is None else of.num_active,
        "intermediate_size": config.feed_forward.d_hidden if of is None else of.d_hidden,
        "shared_intermediate_size": config.feed_forward.d_hidden if of is None else of.shared_width,
        "mamba_expand": 1,
        "mamba_n_heads": 1,
    }
    if LINEAR in kinds:
        mixer = only_mixer(config, Mamba2Config)
        values |= {
            "mamba_expand": mixer.num_heads * mixer.head_dim // config.d_model,
            **heads_written(mixer),
        }
    if FULL in kinds:
        attention = only_mixer(config, AttentionConfig)
        values |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "attention_bias": attention.bias,
            "attention_multiplier": attention.logit_scale,
            "position_embedding_type": "rope" if attention.rotated else "nope",
            "rope_parameters": rotation_written(attention.rope_theta),
        }
    return values


def shared_expert(width: int) -> Iterator[Row]:
    """Of a layer, which a model without experts has alone."""
    yield row(("gate.weight", "up.weight"), "input_linear.weight", split(width, width))
    yield row("down.weight", "output_linear.weight")


def feed_forward(config: ModelConfig) -> Iterator[Row | Either]:
    of = config.experts
    if of is None:
        yield from under("", "shared_mlp.", shared_expert(config.feed_forward.d_hidden))
        return
    yield from under("shared.", "shared_mlp.", shared_expert(of.shared_width))
    yield from under("", "block_sparse_moe.", [either(same(ROUTED), same(MODULES))])
    yield row("router.bias", (), nothing(of.num_experts))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, same(PRE_NORMS, ".weight"))
        options = config.mixers[config.layers[layer]]
        if isinstance(options, Mamba2Config):
            yield from under(ours + "mixer.", theirs + "mamba.", state_space(options))
        else:
            bias = isinstance(options, AttentionConfig) and options.bias
            for kind in (".weight", ".bias") if bias else (".weight",):
                yield from under(ours + "mixer.", theirs + "self_attn.", same(QKVO, kind))
        yield from under(ours + "feed_forward.", theirs, feed_forward(config))


FAMILY = Family(
    name="granitemoehybrid",
    title="Granite 4.0",
    model_types=("granitemoehybrid",),
    architecture="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("mamba2", "attention"),
)
