"""MiniMax-M3's text model: as MiniMax-M2, with a clamped activation, a shared expert and layers without experts; norms
are zero-centred. Most layers attend to blocks of tokens that an indexer chooses (`msa`)."""

from __future__ import annotations

import dataclasses
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
from intarsia.mixers.msa import MSAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.model.feed_forward import CLAMP

SPARSE = "minimax_m3_sparse"
NAMES = {FULL: "attention", SPARSE: "msa"}
THETA = 5_000_000.0


def kinds_of(options: Options, inside: Options, depth: int) -> list[str]:
    """The layers; `inside` is what the release says of those that choose."""
    frequency: list[int] = inside.get("sparse_attention_freq", list, [0] * depth)
    kinds = listed_layers(options, depth, [SPARSE if number else FULL for number in frequency])
    if not set(kinds) <= set(NAMES):
        raise options.unsupported(f"its layers must be {' or '.join(NAMES)}; got {sorted(set(kinds))}")
    inside.only("use_sparse_attention", True, part="sparse attention that is there and switched off")
    inside.only("sparse_score_type", "max", part="score of a block of that kind")
    inside.only("sparse_init_block", 0, part="blocks at the beginning that are always chosen")
    disabled: list[int] = inside.get("sparse_disable_index_value", list, [1] * len(kinds))
    if any(kind == SPARSE and not number for kind, number in zip(kinds, disabled, strict=True)):
        raise inside.unsupported("sparse_disable_index_value is 0, and indexers have no values here")
    return kinds


def indexer_options(options: Options, inside: Options) -> dict[str, Any]:
    """What is said of indexers, in the words of transformers or of the release."""
    spelled = {
        "index_heads": ("index_n_heads", "sparse_num_index_heads", 4),
        "index_dim": ("index_head_dim", "sparse_index_dim", 128),
        "index_block_size": ("index_block_size", "sparse_block_size", 128),
        "index_topk_blocks": ("index_topk_blocks", "sparse_topk_blocks", 16),
        "index_local_blocks": ("index_local_blocks", "sparse_local_block", 1),
    }
    return {
        ours: inside.get(released, int, options.get(theirs, int, default))
        for ours, (theirs, released, default) in spelled.items()
    }


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
    inside = options.within("sparse_attention_config")
    kinds = kinds_of(options, inside, depth)
    indexers = indexer_options(options, inside)
    inside.finish()
    frequency: list[int] = options.get("moe_layer_freq", list, [1] * depth)
    presumed = ["sparse" if number else "dense" for number in frequency]
    with_experts: list[str] = options.get("mlp_layer_types", list, presumed)
    head_dim = options.get("head_dim", int, 128)
    attention = attention_options(options, THETA, head_dim, qk_norm="head", zero_centered_qk_norm=True)
    read = indexers["index_topk_blocks"] * indexers["index_block_size"]
    if SPARSE in kinds and options.attends_to_all(read):
        kinds = [FULL] * depth
    mixers: dict[str, AttentionConfig] = {"attention": attention}
    if SPARSE in kinds:
        same = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
        mixers["msa"] = MSAConfig(**same, **indexers)
    said = options.get("swiglu_limit", float, CLAMP)
    limit, sharpness = None if said == CLAMP else said, options.get("swiglu_alpha", float, 1.702)
    hidden = options.get("intermediate_size", int, 3072)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 200064),
        d_model=options.get("hidden_size", int, 6144),
        depth=depth,
        layout=" ".join(NAMES[kind] for kind in kinds),
        mixers={NAMES[kind]: mixers[NAMES[kind]] for kind in dict.fromkeys(kinds)},
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
        dense_layers=first_dense(options, with_experts, depth),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        zero_centered_norms=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kinds, of = names_of(config, {AttentionConfig: FULL, MSAConfig: SPARSE}), the_experts(config)
    attention: AttentionConfig = (
        only_mixer(config, MSAConfig) if SPARSE in kinds else only_mixer(config, AttentionConfig)
    )
    return {
        **sizes_of(config),
        **attention_written(attention),
        **(indexers_written(attention) if isinstance(attention, MSAConfig) else {}),
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


def indexers_written(config: MSAConfig) -> dict[str, int]:
    return {
        "index_n_heads": config.groups,
        "index_head_dim": config.index_dim,
        "index_block_size": config.index_block_size,
        "index_topk_blocks": config.index_topk_blocks,
        "index_local_blocks": config.index_local_blocks,
    }


def indexer() -> Iterator[Either]:
    """In a module of its own in transformers, and beside the layer's other tensors in releases."""
    names = ("q_proj", "k_proj", "q_norm", "k_norm")
    yield either(
        weights({f"indexer.{name}": f"indexer.{name}" for name in names}),
        weights({f"indexer.{name}": f"index_{name}" for name in names}),
    )


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
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours + "mixer.", theirs + "self_attn.", weights({**QKVO, **QK_NORMS}))
        if isinstance(config.mixers[name], MSAConfig):
            yield from under(ours + "mixer.", theirs + "self_attn.", indexer())
        yield from under(ours + "feed_forward.", theirs, feed_forward(config, layer))


FAMILY = Family(
    name="minimax_m3_vl_text",
    title="MiniMax-M3",
    model_types=("minimax_m3_vl_text", "minimax_m3_vl", "minimax_m3_text"),
    architecture="MiniMaxM3VLForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("attention", "msa"),
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
)
