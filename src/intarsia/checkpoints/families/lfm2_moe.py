"""LFM2 with experts: gated short convolutions, attention in some layers, experts in all but the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.lfm2 import FEED_FORWARD, common, common_written, mixers
from intarsia.checkpoints.families.parts import experts, the_experts
from intarsia.checkpoints.family import Family
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, row, under, weights
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig


def read(options: Options) -> ModelConfig:
    options.only("use_expert_bias", True, part="router of this family without its bias")
    return ModelConfig(
        **common(options),
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 7168)),
        experts=ExpertsConfig(
            num_experts=options.get("num_experts", int, 32),
            d_hidden=options.get("moe_intermediate_size", int, 1792),
            num_active=options.get("num_experts_per_tok", int, 4),
            num_shared=0,
            routed_scaling_factor=options.get("routed_scaling_factor", float, 1.0),
            normalize=options.get("norm_topk_prob", bool, True),
        ),
        dense_layers=options.get("num_dense_layers", int, 2),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    of = the_experts(config)
    return {
        **common_written(config),
        "num_experts": of.num_experts,
        "moe_intermediate_size": of.d_hidden,
        "num_experts_per_tok": of.num_active,
        "routed_scaling_factor": of.routed_scaling_factor,
        "norm_topk_prob": of.normalize,
        "num_dense_layers": config.dense_layers,
        "use_expert_bias": True,
    }


def sparse(config: ExpertsConfig) -> Iterator[Row | Either]:
    yield experts(config, "w1", "w3", "w2")
    yield row("router.weight", "gate.weight")
    yield row("router.bias", "expert_bias")


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from mixers(config)
    for layer in range(config.depth):
        inside = sparse(the_experts(config)) if config.has_experts(layer) else weights(FEED_FORWARD)
        yield from under(f"blocks.{layer}.feed_forward.", f"model.layers.{layer}.feed_forward.", inside)


FAMILY = Family(
    name="lfm2_moe",
    title="LFM2 with experts",
    model_types=("lfm2_moe",),
    architecture="Lfm2MoeForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("conv", "attention"),
)
