"""Qwen3.5, 3.6 and 3.8 with experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import MTP, SWIGLU, VISION, experts, outside, the_experts
from intarsia.checkpoints.families.qwen3_5 import common, common_written, mixers
from intarsia.checkpoints.family import Family
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, nothing, row, under, weights
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig


def expert_options(
    options: Options, experts: int = 256, active: int = 8, *, normalize: bool = True
) -> ExpertsConfig:
    """The experts of all Qwen models: softmax over all, a gated shared one beside them."""
    hidden = options.get("moe_intermediate_size", int, 512)
    shared = options.get("shared_expert_intermediate_size", int, 512)
    return ExpertsConfig(
        num_experts=options.get("num_experts", int, experts),
        d_hidden=hidden,
        num_active=options.get("num_experts_per_tok", int, active),
        d_shared=None if shared == hidden else shared,
        normalize=normalize,
        scores="softmax",
        shared_gate=True,
        bias_update_rate=0,
    )


def read(options: Options) -> ModelConfig:
    options.only("mlp_only_layers", [], part="choice of layers with experts")
    options.maybe("intermediate_size", int)  # of no layer
    config = expert_options(options)
    return ModelConfig(
        **common(options), feed_forward=FeedForwardConfig(config.d_hidden), experts=config, dense_layers=0
    )


def experts_written(config: ModelConfig) -> dict[str, Any]:
    """`expert_options` the other way round."""
    of = the_experts(config)
    return {
        "num_experts": of.num_experts,
        "num_experts_per_tok": of.num_active,
        "moe_intermediate_size": of.d_hidden,
        "shared_expert_intermediate_size": of.shared_width,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {**common_written(config), **experts_written(config)}


def sparse(config: ExpertsConfig) -> Iterator[Row | Either]:
    """A feed-forward of experts. Nothing moves the router's choice."""
    yield experts(config)
    yield from weights({"router": "gate", "shared_gate": "shared_expert_gate"})
    yield row("router.bias", (), nothing(config.num_experts))
    yield from under("shared.", "shared_expert.", weights(SWIGLU))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer in range(config.depth):
        yield from mixers(config, layer)
        yield from under(
            f"blocks.{layer}.feed_forward.", f"model.layers.{layer}.mlp.", sparse(the_experts(config))
        )


FAMILY = Family(
    name="qwen3_5_moe_text",
    title="Qwen3.5, 3.6, 3.8 with experts",
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    architecture="Qwen3_5MoeForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("gdn", "attention"),
    left_out={**VISION, **MTP},
)
