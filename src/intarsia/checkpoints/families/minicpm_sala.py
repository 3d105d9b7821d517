"""MiniCPM-SALA: Lightning Attention with rotated positions 3 : InfLLM-v2 without positions 1, in an order of its own,
with factors of the embedding, of what each part adds, and of what the head is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import (
    PRE_NORMS,
    QK_NORMS,
    QKVO,
    SWIGLU,
    outside,
    read_as,
    sizes_of,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import LightningConfig, MixerConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.model.config import FeedForwardConfig, ModelConfig

SPARSE, LINEAR = "minicpm4", "lightning-attn"
NAMES = {SPARSE: "infllm2", LINEAR: "lightning", "lightning": "lightning"}
KINDS: dict[type[MixerConfig], str] = {InfLLM2Config: SPARSE, LightningConfig: LINEAR}
SCALES = {"1/sqrt(d)": -0.5, "1/d": -1.0}
"""What queries of the linear layers are multiplied with: powers of a head's channels."""


def lightning_options(options: Options, heads: int, head_dim: int) -> LightningConfig:
    heads, head_dim = (
        options.get("lightning_nh", int, heads),
        options.get("lightning_head_dim", int, head_dim),
    )
    options.only("lightning_nkv", heads, part="linear layers with fewer heads of keys than of queries")
    options.only("use_output_gate", True, part="linear layer without an output gate in this family")
    options.only("use_output_norm", True, part="linear layer without a norm of its output in this family")
    if heads & (heads - 1):
        raise options.unsupported(
            f"it has {heads} linear heads, and of a number that is no power of 2 its decays are others than built here"
        )
    scale = options.get("lightning_scale", str, "1/sqrt(d)")
    if scale not in SCALES:
        raise options.unsupported(f"lightning_scale is {scale!r}; known are {', '.join(SCALES)}")
    rotation = Rotation(options)
    rotation.plain()
    rotated = options.get("lightning_use_rope", bool, True)
    return LightningConfig(
        num_heads=heads,
        head_dim=head_dim,
        decay_factor=1.0,  # the same in all layers
        silu=False,
        qk_norm=options.get("qk_norm", bool, True),
        rope=1.0 if rotated else 0.0,
        rope_theta=rotation.theta or 10000.0,
        scale=head_dim ** SCALES[scale],
    )


def sparse_options(options: Options, heads: int, head_dim: int, theta: float) -> InfLLM2Config:
    """Attention to blocks. They count those of the window apart from the `topk`."""
    inside = options.within("sparse_config")
    inside.only("use_nope", False, part="choice by keys that are rotated otherwise than those of attention")
    inside.maybe("dense_len", int)
    window, block = inside.get("window_size", int, 2048), inside.get("block_size", int, 64)
    chosen = inside.get("topk", int, 64) + window // block
    config = InfLLM2Config(
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=options.get("num_key_value_heads", int, heads),
        rope=1.0 if options.get("attn_use_rope", bool, False) else 0.0,
        rope_theta=theta,
        output_gate=options.get("attn_use_output_gate", bool, True),
        kernel_size=inside.get("kernel_size", int, 32),
        kernel_stride=inside.get("kernel_stride", int, 16),
        block_size=block,
        init_blocks=inside.get("init_blocks", int, 1),
        window_size=window,
        topk=chosen,
    )
    inside.finish()
    return config


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("attention_bias", False, part="attention with biases in this family")
    options.maybe("mup_denominator", int)  # of training alone
    kinds: list[str] = options.get("mixer_types", list)
    depth = options.get("num_hidden_layers", int, len(kinds))
    if len(kinds) != depth:
        raise options.unsupported(f"mixer_types has {len(kinds)} layers, and num_hidden_layers is {depth}")
    d_model, heads = options.get("hidden_size", int), options.get("num_attention_heads", int)
    head_dim = options.get("head_dim", int, d_model // heads)
    lightning = lightning_options(options, heads, head_dim)
    sparse = sparse_options(options, heads, head_dim, lightning.rope_theta)
    mixers: dict[str, MixerConfig] = {"lightning": lightning, "infllm2": sparse}
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=d_model,
        depth=depth,
        layout=layout_of(kinds, NAMES, options),
        mixers={NAMES[kind]: mixers[NAMES[kind]] for kind in kinds},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int)),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        embed_scale=options.get("scale_emb", float, 1.0),
        branch_scale=options.get("scale_depth", float, 1.0) / math.sqrt(depth),
        head_scale=options.get("dim_model_base", int, d_model) / d_model,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    lightning, sparse = only_mixer(config, LightningConfig), only_mixer(config, InfLLM2Config)
    scale = next(
        (name for name, power in SCALES.items() if lightning.head_dim**power == lightning.scale), None
    )
    if scale is None:
        raise UnsupportedError(f"the family's linear layers have a scale of {' or '.join(SCALES)}")
    depth, wanted = math.sqrt(config.depth), config.branch_scale
    return {
        **sizes_of(config),
        "num_attention_heads": sparse.num_heads,
        "num_key_value_heads": sparse.kv_heads,
        "head_dim": sparse.head_dim,
        "intermediate_size": config.feed_forward.d_hidden,
        "mixer_types": names_of(config, KINDS),
        "attn_use_rope": sparse.rope == 1,
        "attn_use_output_gate": sparse.output_gate,
        "sparse_config": {
            "kernel_size": sparse.kernel_size,
            "kernel_stride": sparse.kernel_stride,
            "init_blocks": sparse.init_blocks,
            "block_size": sparse.block_size,
            "window_size": sparse.window_size,
            "topk": sparse.topk - sparse.window_size // sparse.block_size,
            "use_nope": False,
        },
        "lightning_nh": lightning.num_heads,
        "lightning_nkv": lightning.num_heads,
        "lightning_head_dim": lightning.head_dim,
        "lightning_scale": scale,
        "lightning_use_rope": lightning.rope == 1,
        "qk_norm": lightning.qk_norm,
        "use_output_gate": True,
        "use_output_norm": True,
        "rope_theta": lightning.rope_theta,
        "scale_emb": config.embed_scale,
        "scale_depth": read_as(wanted, wanted * depth, lambda scale: scale / depth),
        "dim_model_base": round(config.head_scale * config.d_model),
    }


def mixer(options: MixerConfig) -> Iterator[Row]:
    yield from weights(QKVO)
    if isinstance(options, InfLLM2Config):
        yield from weights({"output_gate_proj": "o_gate"} if options.output_gate else {})
        return
    assert isinstance(options, LightningConfig)
    yield from weights(QK_NORMS if options.qk_norm else {})
    yield from weights({"norm": "o_norm", "output_gate_proj": "z_proj"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(f"{ours}mixer.", f"{theirs}self_attn.", mixer(config.mixers[name]))
        yield from under(f"{ours}feed_forward.", f"{theirs}mlp.", weights(SWIGLU))


FAMILY = Family(
    name="minicpm_sala",
    title="MiniCPM-SALA",
    model_types=("minicpm_sala",),
    architecture="MiniCPMSALAForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("infllm2", "lightning"),
    oracle="the published equations, in float64",
    missing="attention to everything in texts of fewer than `dense_len` (8192) tokens, as in the released code: here a "
    "token chooses as soon as there are more blocks than it reads (96 of 64 tokens), and texts of up to 6144 tokens "
    "are the same; and coarser means, of which that code takes the softmax's sums when it chooses",
)
