"""Qwen3-Next: as Qwen3.5 with experts, but the projections of Gated DeltaNet lie together, grouped by key head. Models
without experts are of the family too, as transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import MTP, SWIGLU, outside, the_experts
from intarsia.checkpoints.families.qwen3_5 import common, common_written, gated_delta_rest, mixers
from intarsia.checkpoints.families.qwen3_5_moe import expert_options, experts_written, sparse
from intarsia.checkpoints.family import Family
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, grouped, row, under, weights
from intarsia.mixers import GatedDeltaNetConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

EXPERTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "norm_topk_prob",
)  # fmt: skip


def read(options: Options) -> ModelConfig:
    options.only("decoder_sparse_step", 1, part="choice of layers with experts")
    dense: list[int] = options.get("mlp_only_layers", list, [])
    if sorted(dense) != list(range(len(dense))):
        raise options.unsupported(
            f"mlp_only_layers is {dense}: layers without experts must be the first ones"
        )
    values = common(options)
    experts = None
    if len(dense) == values["depth"] or options.get("num_experts", int, 512) == 0:
        for name in EXPERTS:
            options.maybe(name, object)  # of no layer
    else:
        experts = expert_options(options, 512, 10, normalize=options.get("norm_topk_prob", bool, True))
    return ModelConfig(
        **values,
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 5632)),
        experts=experts,
        dense_layers=len(dense),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    of = config.experts
    experts = {"num_experts": 0} if of is None else experts_written(config) | {"norm_topk_prob": of.normalize}
    return {
        **common_written(config),
        **experts,
        "intermediate_size": config.feed_forward.d_hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.depth if of is None else config.dense_layers)),
    }


def gated_delta_net(config: GatedDeltaNetConfig) -> Iterator[Row]:
    """For each key head in turn: its query, key, and the values and gates of its value heads."""
    H, group = config.num_heads, config.value_heads // config.num_heads
    K, values = config.head_dim, group * config.value_dim
    names = tuple(f"{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "output_gate_proj"))
    yield row(names, "in_proj_qkvz.weight", grouped(H, K, K, values, values))
    yield row(("beta_proj.weight", "decay_proj.weight"), "in_proj_ba.weight", grouped(H, group, group))
    yield from gated_delta_rest()


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        yield from mixers(config, layer, gated_delta_net)
        dense = weights(SWIGLU)
        block = sparse(the_experts(config)) if config.has_experts(layer) else dense
        yield from under(f"blocks.{layer}.feed_forward.", f"model.layers.{layer}.mlp.", block)


FAMILY = Family(
    name="qwen3_next",
    title="Qwen3-Next-80B-A3B",
    model_types=("qwen3_next",),
    architecture="Qwen3NextForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("gdn", "attention"),
    left_out=MTP,
)
