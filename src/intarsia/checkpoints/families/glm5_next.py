"""GLM-5.3-Flash's text model: Kimi Delta Attention with a bounded decay 3 : latent attention without positions 1, four
residual streams. The latent layers attend to some tokens that an indexer chooses; read as if they chose all."""

from __future__ import annotations

from collections.abc import Iterator

from intarsia.checkpoints.families.deepseek_v3 import expert_options, feed_forward, latent_options
from intarsia.checkpoints.families.deepseek_v32 import INDEXER
from intarsia.checkpoints.families.kimi_linear import mixer
from intarsia.checkpoints.families.parts import (
    LINEAR,
    PRE_NORMS,
    VISION,
    dense_layers,
    listed_layers,
    outside,
)
from intarsia.checkpoints.family import Family, layout_of
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, either, same, under, weights
from intarsia.mixers import KDAConfig
from intarsia.model.config import FeedForwardConfig, HyperConnectionsConfig, ModelConfig

NAMES = {LINEAR: "kda", "indexed_attention": "mla", "full_attention": "mla"}
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


def read(options: Options) -> ModelConfig:
    options.only("index_kpool_always_select_tail", True, part="choice that leaves out the last tokens")
    options.chooses(options.get("index_topk", int, 2048))
    for name in options.values:
        if name.startswith("index"):
            options.maybe(name, object)
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("qk_rope_head_dim", 0, part="latent attention with positions in this family")
    options.presume(
        q_lora_rank=1536, qk_nope_head_dim=256, qk_rope_head_dim=0, v_head_dim=256, num_attention_heads=64,
        num_hidden_layers=45,
    )  # fmt: skip
    depth = options.get("num_hidden_layers", int)
    default = [LINEAR if layer % 4 != 3 else "indexed_attention" for layer in range(depth)]
    kinds = listed_layers(options, depth, default)
    eps, limit = options.get("rms_norm_eps", float, 1e-5), options.get("swiglu_limit", float, 10.0)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 154880),
        d_model=options.get("hidden_size", int, 4096),
        depth=depth,
        layout=layout_of(kinds, NAMES, options),
        mixers={"kda": kda_options(options), "mla": latent_options(options, None, latent_norm_eps=eps)},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 12288), limit),
        experts=expert_options(
            options, options.get("n_shared_experts", int, 1), number=288, groups=(1, 1), limit=limit
        ),
        dense_layers=dense_layers(options, depth, 3),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=eps,
        hyper_connections=HyperConnectionsConfig(
            options.get("hc_mult", int, 4),
            options.get("hc_sinkhorn_iters", int, 20),
            options.get("hc_eps", float, 1e-6),
        ),
    )


def streams() -> Iterator[Row | Either]:
    """How the residual streams are read and written."""
    for ours, theirs in STREAMS.items():
        released = same({f"{ours}.{name}": f"hc_{theirs}_{there}" for name, there in PARAMETERS.items()})
        yield either(
            released, same({f"{ours}.{name}": f"{theirs}_hc.{there}" for name, there in PARAMETERS.items()})
        )


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours, theirs, streams())
        yield from under(ours + "mixer.", theirs + "self_attn.", mixer(config, name))
        yield from under(ours + "feed_forward.", theirs + "mlp.", feed_forward(config, layer))


FAMILY = Family(
    name="glm5_next_text",
    title="GLM-5.3-Flash",
    model_types=("glm5_next_text", "glm5_next"),
    architecture="Glm5NextForConditionalGeneration",
    read=read,
    write=None,
    rows=rows,
    left_out={**VISION, **INDEXER},
    missing='sparse attention: loaded as dense if asked (`sparse="dense"`), and saved in this package\'s own format',
)
