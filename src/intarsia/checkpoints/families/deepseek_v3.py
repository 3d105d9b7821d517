"""DeepSeek-V3, R1 and Moonlight: latent attention with rotated positions in every layer, fine-grained experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import (
    PRE_NORMS,
    SWIGLU,
    dense_layers,
    experts,
    outside,
    rotation_written,
    sizes_of,
    the_experts,
    yarn_options,
)
from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Either, Row, Rows, halves_of_pairs, row, under, weights
from intarsia.layers.rope import Yarn
from intarsia.mixers import MLAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

LATENT = {"kv_norm": "kv_a_layernorm", "kv_up_proj": "kv_b_proj", "o_proj": "o_proj"}
QUERY_LATENT = {"q_down_proj": "q_a_proj", "q_norm": "q_a_layernorm"}


def stretched(rotation: Rotation) -> tuple[Yarn | None, float]:
    """YaRN as DeepSeek spells it, and what it does to the logits: `mscale_all_dim` makes all of them larger, and
    `mscale` the rotated channels."""
    rotated = rotation.more.get("mscale", float, 0.0)
    everything = rotation.more.get("mscale_all_dim", float, 0.0)
    yarn = yarn_options(rotation)
    if yarn is None:
        return None, 0.0
    if yarn.attention_factor is None and rotated and everything:
        size = 0.1 * math.log(max(1.0, yarn.factor))
        yarn = dataclasses.replace(yarn, attention_factor=(rotated * size + 1) / (everything * size + 1))
    return yarn, everything


def latent_options(
    options: Options, q_rank: int | None, rotation: Rotation | None = None, **more: Any
) -> MLAConfig:
    """Latent attention, as this family and Kimi Linear spell it. `q_rank` is what holds where the file says nothing;
    without a rotation there are no positions."""
    yarn, yarn_logits = (None, 0.0) if rotation is None else stretched(rotation)
    if rotation is not None and rotation.share != 1:
        raise options.unsupported(
            f"partial_rotary_factor is {rotation.share}, and latent attention rotates all of its shared channels"
        )
    heads = options.get("num_attention_heads", int)
    options.only(
        "num_key_value_heads", heads, part="latent attention with fewer heads of keys than of queries"
    )
    options.only("attention_bias", False, part="latent attention with biases")
    # Of no meaning: what other code derives from the others, or the release has for other engines.
    options.maybe("head_dim", int)
    options.maybe("qk_head_dim", int)
    given = options.maybe("q_lora_rank", int)
    return MLAConfig(
        num_heads=heads,
        kv_rank=options.get("kv_lora_rank", int, 512),
        nope_dim=options.get("qk_nope_head_dim", int, 128),
        rope_dim=options.get("qk_rope_head_dim", int, 64),
        v_dim=options.get("v_head_dim", int, 128),
        # null is said of queries without a latent, and is not the same as nothing.
        q_rank=given if "q_lora_rank" in options.values else q_rank,
        rotate=rotation is not None,
        rope_theta=10000.0 if rotation is None else rotation.theta or 10000.0,
        yarn=yarn,
        yarn_logits=yarn_logits,
        **more,
    )


def latent_written(config: MLAConfig) -> dict[str, Any]:
    """`latent_options` the other way round."""
    return {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "kv_lora_rank": config.kv_rank,
        "q_lora_rank": config.q_rank,
        "qk_nope_head_dim": config.nope_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.v_dim,
    }


def rotated_written(config: MLAConfig) -> dict[str, Any]:
    """The rotation of latent attention: `stretched` the other way round."""
    rope = rotation_written(config.rope_theta, config.yarn)
    if config.yarn_logits:
        rope["mscale_all_dim"] = config.yarn_logits
        if config.yarn is not None and config.yarn.attention_factor == 1:
            rope["mscale"] = config.yarn_logits  # for those who do not know attention_factor
    return rope


def latent_attention(config: MLAConfig) -> Iterator[Row]:
    """Neighbouring channels are rotated as a pair there; here a pair's second half lies behind its first."""
    queries = "q_proj.weight" if config.q_rank is None else "q_b_proj.weight"
    if config.q_rank is not None:
        yield from weights(QUERY_LATENT)
    yield from weights(LATENT)
    if not config.rotate:
        yield row("q_proj.weight", queries)
        yield row("kv_down_proj.weight", "kv_a_proj_with_mqa.weight")
        return
    yield row("q_proj.weight", queries, halves_of_pairs(config.num_heads, config.nope_dim, config.rope_dim))
    shared = halves_of_pairs(1, config.kv_rank, config.rope_dim)
    yield row("kv_down_proj.weight", "kv_a_proj_with_mqa.weight", shared)


def expert_options(
    options: Options, shared: int, number: int = 256, groups: tuple[int, int] = (8, 4), **more: Any
) -> ExpertsConfig:
    """Experts as this family spells them, `shared` of which serve every token. `number` and `groups` (all, active)
    are what holds where the file says nothing."""
    options.only("scoring_func", "sigmoid", part="router of that kind")
    options.only("topk_method", "noaux_tc", part="choice of experts of that kind")
    return ExpertsConfig(
        num_experts=options.get("n_routed_experts", int, number, "num_local_experts"),
        d_hidden=options.get("moe_intermediate_size", int, 2048),
        num_active=options.get("num_experts_per_tok", int, 8),
        num_shared=shared,
        routed_scaling_factor=options.get("routed_scaling_factor", float, 2.5),
        normalize=options.get("norm_topk_prob", bool, True),
        num_groups=options.get("n_group", int, groups[0]),
        num_active_groups=options.get("topk_group", int, groups[1]),
        **more,
    )


def experts_written(config: ExpertsConfig) -> dict[str, Any]:
    """How experts are chosen: what all say alike who have DeepSeek's."""
    return {
        "moe_intermediate_size": config.d_hidden,
        "num_experts_per_tok": config.num_active,
        "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.normalize,
        "n_group": config.num_groups,
        "topk_group": config.num_active_groups,
    }


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only(
        "rope_interleave", True, part="order of rotated channels other than DeepSeek's in this family"
    )
    depth = options.get("num_hidden_layers", int)
    shared = options.get("n_shared_experts", int, 0 if "n_shared_experts" in options.values else 1)
    dense, experts = dense_layers(options, depth, 3), expert_options(options, shared)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=depth,
        layout="mla",
        mixers={"mla": latent_options(options, 1536, Rotation(options))},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 18432)),
        experts=experts if dense < depth else None,
        dense_layers=dense,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    names_of(config, {MLAConfig: "mla"})
    return written(config, only_mixer(config, MLAConfig))


def written(config: ModelConfig, mla: MLAConfig) -> dict[str, Any]:
    """The options of a model whose layers have this latent attention."""
    return {
        **sizes_of(config),
        **latent_written(mla),
        "rope_parameters": rotated_written(mla),
        "rope_interleave": True,
        "intermediate_size": config.feed_forward.d_hidden,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        **which_experts(config),
    }


def which_experts(config: ModelConfig) -> dict[str, Any]:
    """The experts of a model, and which layers have none: all, where there are none."""
    of = config.experts
    if of is None:
        return {"first_k_dense_replace": config.depth}
    return {
        "first_k_dense_replace": config.dense_layers,
        "n_routed_experts": of.num_experts,
        "n_shared_experts": of.num_shared,
        **experts_written(of),
    }


def sigmoid_experts(config: ExpertsConfig) -> Iterator[Row]:
    """All of a layer's experts but the routed ones themselves."""
    yield row("router.weight", "gate.weight")
    yield row("router.bias", "gate.e_score_correction_bias")
    if config.num_shared:
        yield from under("shared.", "shared_experts.", weights(SWIGLU))  # type: ignore[misc]


def feed_forward(config: ModelConfig, layer: int) -> Rows:
    """Of a layer, dense or with experts."""
    if not config.has_experts(layer):
        return list(weights(SWIGLU))
    of = the_experts(config)
    return [experts(of), *sigmoid_experts(of)]


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(
            ours + "mixer.", theirs + "self_attn.", latent_attention(only_mixer(config, MLAConfig))
        )
        yield from under(ours + "feed_forward.", theirs + "mlp.", feed_forward(config, layer))


FAMILY = Family(
    name="deepseek_v3",
    title="DeepSeek-V3 and R1, Kimi K2, Moonlight",
    model_types=("deepseek_v3", "kimi_k2"),
    architecture="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("mla",),
)
