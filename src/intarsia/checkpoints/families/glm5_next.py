"""GLM-5.3-Flash's text model: Kimi Delta Attention with a bounded decay 3 : latent attention without positions 1, four
residual streams. The latent layers attend to the pools of tokens that an indexer chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.deepseek_v3 import (
    expert_options,
    feed_forward,
    latent_attention,
    latent_options,
    latent_written,
    which_experts,
)
from intarsia.checkpoints.families.deepseek_v32 import (
    INDEXER,
    as_dense,
    indexer,
    indexer_options,
    indexer_written,
)
from intarsia.checkpoints.families.glm_moe_dsa import indexer_kinds
from intarsia.checkpoints.families.kimi_linear import delta_attention
from intarsia.checkpoints.families.parts import (
    LINEAR,
    PRE_NORMS,
    VISION,
    dense_layers,
    listed_layers,
    outside,
    sizes_of,
)
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, either, same, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.mixers.base import MixerConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.model.config import FeedForwardConfig, HyperConnectionsConfig, ModelConfig

INDEXED = "indexed_attention"
KINDS = {LINEAR: LINEAR, INDEXED: INDEXED, "full_attention": INDEXED}
NAMES = {"full": "dsa", "shared": "shared"}
STREAMS = {"mixer_streams": "attn", "feed_forward_streams": "ffn"}
PARAMETERS = {"weight": "fn", "base": "base", "scale": "scale"}


def kda_options(options: Options) -> KDAConfig:
    """Some files have what the rest says in a table of its own; it goes before."""
    linear = options.within("linear_attn_config")
    bound = linear.maybe("gate_lower_bound", float)
    if bound is None:
        said = "linear_lower_bound" in options.values
        bound = options.maybe("linear_lower_bound", float) if said else -5.0
    safe = linear.get("safe_gate", bool, bool(linear.values))
    if bound is None and safe:
        bound = -5.0
    for name in ("kda_layers", "full_attn_layers"):
        linear.maybe(name, list)  # those of layer_types
    config = KDAConfig(
        num_heads=linear.get("num_heads", int, options.get("linear_num_heads", int, 64)),
        head_dim=linear.get("head_dim", int, options.get("linear_head_dim", int, 128)),
        conv_size=linear.get("short_conv_kernel_size", int, options.get("linear_conv_kernel_dim", int, 4)),
        gate="softplus" if bound is None else "bounded",
        gate_lower_bound=-5.0 if bound is None else bound,
    )
    linear.finish()
    return config


def latent_layers(options: Options, depth: int, kinds: list[str], eps: float) -> dict[int, MixerConfig]:
    """What the layers are that are not linear, by their numbers."""
    found = [layer for layer in range(depth) if KINDS[kinds[layer]] == INDEXED]
    if as_dense(options, options.get("index_topk", int, 2048)):
        latent = latent_options(options, None, latent_norm_eps=eps)
        return dict.fromkeys(found, latent)
    shared = indexer_kinds(options, depth, found[0]) if found else []
    latent = latent_options(options, None, latent_norm_eps=eps)
    dsa = indexer_options(options, latent, 32, options.get("index_kpool", int, 16))
    return {layer: dataclasses.replace(dsa, shares=shared[layer] == "shared") for layer in found}


def name_of(mixer: MixerConfig | None) -> str:
    """What a layer is called here."""
    if mixer is None:
        return "kda"
    return NAMES["shared" if mixer.shares else "full"] if isinstance(mixer, DSAConfig) else "mla"


def read(options: Options) -> ModelConfig:
    options.only("index_kpool_always_select_tail", True, part="choice that leaves out the last tokens")
    options.only("hidden_act", "silu", part="activation of that name")
    options.presume(
        q_lora_rank=1536, qk_nope_head_dim=256, qk_rope_head_dim=0, v_head_dim=256, num_attention_heads=64,
        num_hidden_layers=45,
    )  # fmt: skip
    depth = options.get("num_hidden_layers", int)
    default = [LINEAR if layer % 4 != 3 else INDEXED for layer in range(depth)]
    kinds = listed_layers(options, depth, default)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise options.unsupported(f"layer_types has {unknown}; known are {', '.join(KINDS)}")
    eps, limit = options.get("rms_norm_eps", float, 1e-5), options.get("swiglu_limit", float, 10.0)
    latent = latent_layers(options, depth, kinds, eps)
    options.only("qk_rope_head_dim", 0, part="latent attention with positions in this family")
    kda = kda_options(options)
    mixers = {name_of(latent.get(layer)): latent.get(layer, kda) for layer in range(depth)}
    dense = dense_layers(options, depth, 3)
    experts = expert_options(
        options, options.get("n_shared_experts", int, 1), number=288, groups=(1, 1), limit=limit
    )
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 154880),
        d_model=options.get("hidden_size", int, 4096),
        depth=depth,
        layout=" ".join(name_of(latent.get(layer)) for layer in range(depth)),
        mixers=mixers,
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 12288), limit),
        experts=experts if dense < depth else None,
        dense_layers=dense,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=eps,
        hyper_connections=HyperConnectionsConfig(
            options.get("hc_mult", int, 4),
            options.get("hc_sinkhorn_iters", int, 20),
            options.get("hc_eps", float, 1e-6),
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kinds = names_of(config, {KDAConfig: LINEAR, DSAConfig: INDEXED})
    hyper, kda = config.hyper_connections, only_mixer(config, KDAConfig)
    limit = config.feed_forward.limit if config.experts is None else config.experts.limit
    if hyper is None or limit is None:
        raise UnsupportedError("the family has several residual streams, and a limit of activations")
    latent = {
        layer: mixer
        for layer, name in enumerate(config.layers)
        if isinstance(mixer := config.mixers[name], DSAConfig)
    }
    if len({dataclasses.replace(mixer, shares=False) for mixer in latent.values()}) != 1:
        raise UnsupportedError("the family's layers of 'dsa' differ in nothing but what they share")
    dsa = next(iter(latent.values()))
    shared = [
        "shared" if layer in latent and latent[layer].shares else "full" for layer in range(config.depth)
    ]
    dense = config.depth if config.experts is None else config.dense_layers
    return {
        **sizes_of(config),
        **latent_written(dsa),
        **indexer_written(dsa),
        "index_kpool": dsa.index_pool,
        "layer_types": kinds,
        "indexer_types": shared,
        "linear_num_heads": kda.num_heads,
        "linear_head_dim": kda.head_dim,
        "linear_conv_kernel_dim": kda.conv_size,
        "linear_lower_bound": kda.gate_lower_bound if kda.gate == "bounded" else None,
        "intermediate_size": config.feed_forward.d_hidden,
        "swiglu_limit": limit,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (config.depth - dense),
        **which_experts(config),
        "hc_mult": hyper.streams,
        "hc_sinkhorn_iters": hyper.iterations,
        "hc_eps": hyper.eps,
    }


def streams() -> Iterator[Row | Either]:
    """How the residual streams are read and written."""
    for ours, theirs in STREAMS.items():
        released = same({f"{ours}.{name}": f"hc_{theirs}_{there}" for name, there in PARAMETERS.items()})
        yield either(
            released, same({f"{ours}.{name}": f"{theirs}_hc.{there}" for name, there in PARAMETERS.items()})
        )


def mixer(options: MixerConfig) -> Iterator[Row | Either]:
    """The layer of these options."""
    if isinstance(options, KDAConfig):
        yield from delta_attention(options, flat=True)
        return
    assert isinstance(options, MLAConfig)
    yield from latent_attention(options)
    if isinstance(options, DSAConfig) and not options.shares:
        yield from under("indexer.", "indexer.", indexer(options, pairs=False))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours, theirs, streams())
        yield from under(ours + "mixer.", theirs + "self_attn.", mixer(config.mixers[name]))
        yield from under(ours + "feed_forward.", theirs + "mlp.", feed_forward(config, layer))


FAMILY = Family(
    name="glm5_next_text",
    title="GLM-5.3-Flash",
    model_types=("glm5_next_text", "glm5_next"),
    architecture="Glm5NextForConditionalGeneration",
    read=read,
    write=write,
    rows=rows,
    mixers=("kda", "dsa"),
    left_out={**VISION, **INDEXER},
    # Without the tower itself, which transformers makes of no layers then.
    around={"model_type": "glm5_next", "vision_config": {"model_type": "glm5_next_vision", "depth": 0}},
)
