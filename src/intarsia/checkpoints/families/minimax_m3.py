"""MiniMax-M3's text model: as MiniMax-M2, with a clamped activation, a shared expert and layers without experts; norms
are zero-centred. Most layers attend to blocks of tokens that an indexer chooses; read as if they chose all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.minimax_m2 import attention_options, attention_written
from intarsia.checkpoints.families.parts import (
    FULL,
    MTP,
    PRE_NORMS,
    QK_NORMS,
    QKVO,
    SWIGLU,
    VISION,
    experts,
    first_dense,
    listed_layers,
    outside,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, either, row, split, under, weights
from intarsia.mixers import AttentionConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.model.feed_forward import CLAMP

SPARSE = "minimax_m3_sparse"
THETA = 5_000_000.0


def read_indexers(options: Options, depth: int) -> None:
    """Read all that is said of layers that choose blocks of tokens, and refuse them unless they shall be dense."""
    inside = options.within("sparse_attention_config")
    frequency: list[int] = inside.get("sparse_attention_freq", list, [0] * depth)
    kinds = listed_layers(options, depth, [SPARSE if number else FULL for number in frequency])
    if not set(kinds) <= {FULL, SPARSE}:
        raise options.unsupported(f"its layers must be {FULL} or {SPARSE}; got {sorted(set(kinds))}")
    blocks = inside.get("sparse_topk_blocks", int, options.get("index_topk_blocks", int, 16))
    size = inside.get("sparse_block_size", int, options.get("index_block_size", int, 128))
    for said in (options, inside):
        for name in said.values:
            if name.startswith(("index_", "sparse_", "use_sparse")):
                said.maybe(name, object)
    inside.finish()
    if SPARSE in kinds:
        options.chooses(blocks * size, f"MiniMax sparse attention, in {blocks} blocks of {size}")


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", "swigluoai", part="activation of that name in this family")
    options.only("swiglu_beta", 1, part="clamped activation that adds another number than 1")
    options.only("scoring_func", "sigmoid", part="router of that kind in this family")
    options.only("use_routing_bias", True, part="router without a correcting bias in this family")
    options.only("use_qk_norm", True, part="attention without norms of queries and keys in this family")
    options.only("qk_norm_type", "per_head", part="norm of queries and keys of that kind in this family")
    options.only("use_gemma_norm", True, part="norm that is not zero-centred in this family")
    options.only("attention_output_gate", False, part="gate of attention's output in this family")
    options.only("n_shared_experts", 1, part="number of shared experts other than one in this family")
    for name in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers"):
        options.maybe(name, object)  # of what is not in the text model
    options.presume(num_key_value_heads=4, num_attention_heads=64)
    depth = options.get("num_hidden_layers", int, 60)
    read_indexers(options, depth)
    frequency: list[int] = options.get("moe_layer_freq", list, [1] * depth)
    presumed = ["sparse" if number else "dense" for number in frequency]
    kinds: list[str] = options.get("mlp_layer_types", list, presumed)
    head_dim = options.get("head_dim", int, 128)
    attention = attention_options(options, THETA, head_dim, qk_norm="head", zero_centered_qk_norm=True)
    said = options.get("swiglu_limit", float, CLAMP)
    limit, sharpness = None if said == CLAMP else said, options.get("swiglu_alpha", float, 1.702)
    hidden = options.get("intermediate_size", int, 3072)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 200064),
        d_model=options.get("hidden_size", int, 6144),
        depth=depth,
        layout="attention",
        mixers={"attention": attention},
        feed_forward=FeedForwardConfig(
            options.get("dense_intermediate_size", int, 12288), limit, "clamped", sharpness=sharpness
        ),
        experts=ExpertsConfig(
            num_experts=options.get("num_local_experts", int, 128, "num_experts"),
            d_hidden=hidden,
            num_active=options.get("num_experts_per_tok", int, 4),
            num_shared=1,
            d_shared=options.get("shared_intermediate_size", int, 3072),
            routed_scaling_factor=options.get("routed_scaling_factor", float, 2.0),
            activation="clamped",
            limit=limit,
            sharpness=sharpness,
        ),
        dense_layers=first_dense(options, kinds, depth),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        zero_centered_norms=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kinds, of = names_of(config, {AttentionConfig: FULL}), the_experts(config)
    return {
        **sizes_of(config),
        **attention_written(only_mixer(config, AttentionConfig)),
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if config.has_experts(n) else "dense" for n in range(config.depth)],
        "intermediate_size": of.d_hidden,
        "dense_intermediate_size": config.feed_forward.d_hidden,
        "shared_intermediate_size": of.shared_width,
        "num_local_experts": of.num_experts,
        "num_experts_per_tok": of.num_active,
        "routed_scaling_factor": of.routed_scaling_factor,
        "swiglu_alpha": of.sharpness,
        "swiglu_limit": CLAMP if of.limit is None else of.limit,
    }


def joined_gate(width: int) -> Iterator[Row]:
    """A feed-forward as transformers' modules have it, gate and up in one matrix."""
    yield row(("gate.weight", "up.weight"), "gate_up_proj.weight", split(width, width))
    yield row("down.weight", "down_proj.weight")


def block_of_experts(config: ExpertsConfig) -> Iterator[Either]:
    """`mlp` in transformers' modules, which a text model is written as, and `block_sparse_moe` in releases."""
    apart, stacked = experts(config, "w1", "w3", "w2").layouts
    modules = [*stacked, row("router.bias", "gate.e_score_correction_bias")]
    modules += under("shared.", "shared_experts.", joined_gate(config.shared_width))  # type: ignore[arg-type]
    released = [*apart, row("router.bias", "e_score_correction_bias")]
    released += under("shared.", "shared_experts.", weights(SWIGLU))  # type: ignore[arg-type]
    gate = row("router.weight", "gate.weight")
    yield either(
        [each.under("", "mlp.") for each in (*modules, gate)],
        [each.under("", "block_sparse_moe.") for each in (*released, gate)],
    )


def feed_forward(config: ModelConfig, layer: int) -> Iterator[Row | Either]:
    if config.has_experts(layer):
        yield from block_of_experts(the_experts(config))
        return
    modules = [each.under("", "mlp.") for each in joined_gate(config.feed_forward.d_hidden)]
    yield either(modules, [each.under("", "mlp.") for each in weights(SWIGLU)])


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours + "mixer.", theirs + "self_attn.", weights({**QKVO, **QK_NORMS}))
        yield from under(ours + "feed_forward.", theirs, feed_forward(config, layer))


FAMILY = Family(
    name="minimax_m3_vl_text",
    title="MiniMax-M3",
    model_types=("minimax_m3_vl_text", "minimax_m3_vl", "minimax_m3_text"),
    architecture="MiniMaxM3VLForCausalLM",
    read=read,
    write=write,
    rows=rows,
    left_out={
        **VISION,
        **MTP,
        **dict.fromkeys(("vision_tower.", "model.vision_tower."), "the vision tower"),
        **dict.fromkeys(
            ("multi_modal_projector.", "model.multi_modal_projector.", "patch_merge_mlp."),
            "the vision tower's projector",
        ),
        ".self_attn.index": "the indexers of sparse attention",
    },
    missing='sparse attention: layers that have it are loaded as dense if asked (`sparse="dense"`)',
)
