"""Mamba-2: state spaces alone, without feed-forwards, as transformers has them and as `mamba_ssm` wrote them first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import CONVOLUTION, Either, Row, either, row, same, split, under, weights
from intarsia.errors import CheckpointError
from intarsia.mixers import Mamba2Config
from intarsia.model.config import FeedForwardConfig, ModelConfig

PARTS = ("output_gate_proj", "v_proj", "k_proj", "q_proj", "dt_proj")
"""In the order in which `in_proj` has them: z, x, B, C and dt."""
INFINITY = {"__float__": "Infinity"}
"""How transformers writes it."""


def step_limits(options: Options) -> dict[str, Any]:
    """Of the step size; no upper one where it is infinite."""
    limits: list[Any] = options.get("time_step_limit", list, [0.0, math.inf])
    least, most = (math.inf if x == INFINITY else x for x in limits)
    return {"dt_min": float(least), "dt_max": None if math.isinf(most) else float(most)}


def heads_options(options: Options, inner: int, said_as: str) -> dict[str, Any]:
    """The sizes of Mamba-2 as hybrids spell them that have `mamba_n_heads`; `said_as` gives `inner`, all channels."""
    options.maybe("mamba_chunk_size", int)  # of how it is computed
    heads = options.get("mamba_n_heads", int, 128)
    said = None if options.values.get("mamba_d_head") == "auto" else options.maybe("mamba_d_head", int)
    options.maybe("mamba_d_head", object)
    head_dim = inner // heads if said is None else said
    if heads * head_dim != inner:
        raise CheckpointError(
            f"{options.where}: {heads} heads of {head_dim} channels do not make up {said_as}, {inner}"
        )
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "state_dim": options.get("mamba_d_state", int, 256),
        "num_groups": options.get("mamba_n_groups", int, 1),
        "conv_size": options.get("mamba_d_conv", int, 4),
        "bias": options.get("mamba_proj_bias", bool, False),
        "conv_bias": options.get("mamba_conv_bias", bool, True),
        **step_limits(options),
    }


def heads_written(config: Mamba2Config) -> dict[str, Any]:
    """`heads_options` the other way round, but for the channels together."""
    return {
        "mamba_n_heads": config.num_heads,
        "mamba_d_head": config.head_dim,
        "mamba_d_state": config.state_dim,
        "mamba_n_groups": config.num_groups,
        "mamba_d_conv": config.conv_size,
        "mamba_proj_bias": config.bias,
        "mamba_conv_bias": config.conv_bias,
        "time_step_limit": limits_written(config),
    }


def limits_written(config: Mamba2Config) -> list[Any]:
    """`step_limits` the other way round."""
    return [config.dt_min, INFINITY if config.dt_max is None else config.dt_max]


def model_of(mixer: Mamba2Config, **more: Any) -> ModelConfig:
    """A model of such layers alone."""
    return ModelConfig(
        layout="mamba2",
        mixers={"mamba2": mixer},
        mixer_only=("mamba2",),
        feed_forward=FeedForwardConfig(mixer.num_heads * mixer.head_dim),
        **more,
    )


def read(options: Options) -> ModelConfig:
    if options.has("ssm_cfg"):
        return read_original(options)
    options.only("hidden_act", "silu", part="activation of that name in Mamba-2")
    first = (
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_rank",
        "rescale_prenorm_residual",
    )
    for name in (*first, "residual_in_fp32", "chunk_size"):  # of the first weights, and of how it is computed
        options.maybe(name, object)
    d_model, expand = options.get("hidden_size", int, 4096), options.get("expand", int, 2)
    mixer = Mamba2Config(
        num_heads=options.get("num_heads", int, 128),
        head_dim=options.get("head_dim", int, 64),
        state_dim=options.get("state_size", int, 128),
        num_groups=options.get("n_groups", int, 8),
        conv_size=options.get("conv_kernel", int, 4),
        bias=options.get("use_bias", bool, False),
        conv_bias=options.get("use_conv_bias", bool, True),
        **step_limits(options),
    )
    inner = mixer.num_heads * mixer.head_dim
    if inner != expand * d_model:
        raise CheckpointError(
            f"{options.where}: {mixer.num_heads} heads of {mixer.head_dim} channels are {inner}, and expand = "
            f"{expand} times hidden_size is {expand * d_model}"
        )
    return model_of(
        mixer,
        vocab_size=options.get("vocab_size", int, 32768),
        d_model=d_model,
        depth=options.get("num_hidden_layers", int, 64),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("layer_norm_epsilon", float, 1e-5),
    )


def read_original(options: Options) -> ModelConfig:
    """As `mamba_ssm` writes it, which has no `model_type`. The embedding has as many rows as the padded vocabulary."""
    options.only("d_intermediate", 0, part="feed-forwards in this family")
    options.only("attn_layer_idx", [], part="attention in this family")
    options.only("rms_norm", True, part="layer norm in this family")
    for name in ("attn_cfg", "fused_add_norm", "residual_in_fp32"):  # of attention, and of how it is computed
        options.maybe(name, object)
    d_model = options.get("d_model", int, 2560)
    inside = options.within("ssm_cfg")
    if inside.get("layer", str, "Mamba1") != "Mamba2":
        raise options.unsupported("its layers are Mamba-1, whose published checkpoints are not read yet")
    inside.only("norm_before_gate", False, part="Mamba-2 with its norm before the gate in this family")
    inside.only("rmsnorm", True, part="Mamba-2 without its norm in this family")
    inside.only("D_has_hdim", False, part="Mamba-2 with a skip of each channel")
    inside.only("d_ssm", part="Mamba-2 with a feed-forward inside")
    inside.only("activation", "silu", "swish", part="activation of that name in Mamba-2")
    for name in (
        "A_init_range",
        "chunk_size",
        "dt_init_floor",
        "dt_max",
        "dt_min",
        "use_mem_eff_path",
        "conv_init",
    ):
        inside.maybe(name, object)  # of the first weights, and of how it is computed
    head_dim = inside.get("headdim", int, 64)
    least, most = inside.get("dt_limit", list, [0.0, math.inf])
    mixer = Mamba2Config(
        num_heads=inside.get("expand", int, 2) * d_model // head_dim,
        head_dim=head_dim,
        state_dim=inside.get("d_state", int, 128),
        num_groups=inside.get("ngroups", int, 1),
        conv_size=inside.get("d_conv", int, 4),
        dt_min=float(least),
        dt_max=None if math.isinf(most) else float(most),
        bias=inside.get("bias", bool, False),
        conv_bias=inside.get("conv_bias", bool, True),
    )
    inside.finish()
    vocabulary, multiple = (
        options.get("vocab_size", int),
        options.get("pad_vocab_size_multiple", int, 8),
    )
    return model_of(
        mixer,
        vocab_size=-(-vocabulary // multiple) * multiple,
        d_model=d_model,
        depth=options.get("n_layer", int, 64),
        tie_embeddings=options.get("tie_embeddings", bool, True),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    names_of(config, {Mamba2Config: "mamba2"})
    mixer = only_mixer(config, Mamba2Config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.depth,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "expand": mixer.num_heads * mixer.head_dim // config.d_model,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.state_dim,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_size,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "time_step_limit": limits_written(mixer),
    }


def state_space(config: Mamba2Config) -> Iterator[Row]:
    """A layer of Mamba-2, as all families have it: one projection of the input, and one convolution."""
    inner, keys = config.num_heads * config.head_dim, config.num_groups * config.state_dim
    for kind in ("weight", "bias") if config.bias else ("weight",):
        sizes = split(inner, inner, keys, keys, config.num_heads)
        yield row(tuple(f"{part}.{kind}" for part in PARTS), f"in_proj.{kind}", sizes)
        yield row(f"o_proj.{kind}", f"out_proj.{kind}")
    yield row("conv.weight", "conv1d.weight", CONVOLUTION)
    if config.conv_bias:
        yield row("conv.bias", "conv1d.bias")
    yield from same({f"decay.{name}": name for name in ("A_log", "dt_bias", "D")})
    if config.norm != "none":
        yield from weights({"norm": "norm"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield either(
        weights({"embed": "backbone.embeddings"}), weights({"embed": "backbone.embedding"})
    )  # the first code's
    yield from weights({"norm": "backbone.norm_f"})
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"backbone.layers.{layer}."
        yield from under(ours, theirs, weights({"mixer_norm": "norm"}))
        yield from under(ours + "mixer.", theirs + "mixer.", state_space(only_mixer(config, Mamba2Config)))


FAMILY = Family(
    name="mamba2",
    title="Mamba-2, Codestral Mamba",
    model_types=("mamba2", "mamba_ssm"),
    architecture="Mamba2ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("mamba2",),
    missing="hybrids with attention, and Mamba-1, in the layout of `mamba_ssm`; its pickles",
)
