"""Falcon-H1: attention and Mamba-2 side by side in every layer, and a factor wherever a number passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.mamba2 import heads_options, heads_written, state_space
from intarsia.checkpoints.families.parts import QKVO, SWIGLU, outside, read_as, rotation_written, sizes_of
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, same, under, weights
from intarsia.errors import CheckpointError
from intarsia.mixers import AttentionConfig, Mamba2Config, ParallelConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

NORMS = {"mixer_norm": "input_layernorm", "feed_forward_norm": "pre_ff_layernorm"}
NO_SCALES = (1.0,) * 5


def factors(options: Options, name: str, count: int) -> tuple[float, ...]:
    """So many factors, of which a file may say nothing."""
    found: list[Any] = options.get(name, list, [1.0] * count)
    if len(found) != count:
        raise CheckpointError(f"{options.where}: {name} must have {count} numbers; it is {found}")
    return tuple(float(x) for x in found)


def state_space_options(options: Options, d_model: int) -> Mamba2Config:
    options.maybe("mamba_use_mlp", bool)  # all layers have a feed-forward
    inner = options.get("mamba_d_ssm", int, options.get("mamba_expand", int, 2) * d_model)
    sizes = heads_options(options, inner, "mamba_d_ssm")
    bias, given = sizes["bias"], options.get("ssm_in_multiplier", float, 1.0)
    if bias != options.get("projectors_bias", bool, False):
        raise options.unsupported(
            "mamba_proj_bias and projectors_bias differ: Mamba-2 has all biases or none"
        )
    if bias and given != 1:
        raise options.unsupported(f"ssm_in_multiplier is {given}, beside biases that it does not multiply")
    scales = tuple(given * x for x in factors(options, "ssm_multipliers", 5))
    before = options.get("mamba_norm_before_gate", bool, True)
    normed = options.get("mamba_rms_norm", bool, False)
    return Mamba2Config(
        **sizes,
        input_scales=None if scales == NO_SCALES else scales,  # type: ignore[arg-type]
        norm="none" if not normed else "before_gate" if before else "after_gate",
    )


def attention_options(options: Options, d_model: int) -> AttentionConfig:
    rotation = Rotation(options)
    rotation.plain()
    heads = options.get("num_attention_heads", int, 32)
    head_dim = options.get("head_dim", int, d_model // heads)
    factor = options.get("key_multiplier", float, 1.0)
    return AttentionConfig(
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=options.get(
            "num_key_value_heads", int, heads if "num_key_value_heads" in options.values else 8
        ),
        rope=rotation.share,
        rope_theta=rotation.theta or 10000.0,
        bias=options.get("attention_bias", bool, False),
        scale=None if factor == 1 else factor * head_dim**-0.5,
    )


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("mlp_bias", False, part="feed-forward with biases")
    for name in ("num_logits_to_keep", "attn_layer_indices", "mlp_expansion_factor"):
        options.maybe(name, object)
    d_model, depth = options.get("hidden_size", int, 4096), options.get("num_hidden_layers", int, 32)
    gate, down = factors(options, "mlp_multipliers", 2)
    mixer = ParallelConfig(
        attention=attention_options(options, d_model),
        mamba2=state_space_options(options, d_model),
        attention_in=options.get("attention_in_multiplier", float, 1.0),
        attention_out=options.get("attention_out_multiplier", float, 1.0),
        mamba2_out=options.get("ssm_out_multiplier", float, 1.0),
    )
    inside = options.get("intermediate_size", int, 14336)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 128000),
        d_model=d_model,
        depth=depth,
        layout="parallel",
        mixers={"parallel": mixer},
        feed_forward=FeedForwardConfig(inside, gate_scale=gate, scale=down),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-5),
        embed_scale=options.get("embedding_multiplier", float, 1.0),
        head_scale=options.get("lm_head_multiplier", float, 1.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    names_of(config, {ParallelConfig: "hybrid"})
    parallel = only_mixer(config, ParallelConfig)
    attention, mamba = parallel.attention, parallel.mamba2
    root = attention.head_dim**-0.5
    return {
        **sizes_of(config),
        "intermediate_size": config.feed_forward.d_hidden,
        "mlp_multipliers": [config.feed_forward.gate_scale, config.feed_forward.scale],
        "embedding_multiplier": config.embed_scale,
        "lm_head_multiplier": config.head_scale,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "rope_parameters": rotation_written(attention.rope_theta),
        "key_multiplier": read_as(attention.logit_scale, attention.logit_scale / root, lambda x: x * root),
        "attention_in_multiplier": parallel.attention_in,
        "attention_out_multiplier": parallel.attention_out,
        "ssm_out_multiplier": parallel.mamba2_out,
        "ssm_in_multiplier": 1.0,
        "ssm_multipliers": list(mamba.input_scales or NO_SCALES),
        "mamba_d_ssm": mamba.num_heads * mamba.head_dim,
        **heads_written(mamba),
        "projectors_bias": mamba.bias,
        "mamba_rms_norm": mamba.norm != "none",
        "mamba_norm_before_gate": mamba.norm == "before_gate",
    }


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config, norm="final_layernorm")
    parallel = only_mixer(config, ParallelConfig)
    kinds = (".weight", ".bias") if parallel.attention.bias else (".weight",)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(NORMS))
        for kind in kinds:
            yield from under(ours + "mixer.attention.", theirs + "self_attn.", same(QKVO, kind))
        yield from under(ours + "mixer.mamba2.", theirs + "mamba.", state_space(parallel.mamba2))
        yield from under(ours + "feed_forward.", theirs + "feed_forward.", weights(SWIGLU))


FAMILY = Family(
    name="falcon_h1",
    title="Falcon-H1",
    model_types=("falcon_h1",),
    architecture="FalconH1ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("parallel",),
)
