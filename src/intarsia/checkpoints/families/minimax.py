"""MiniMax-Text-01 and M1: Lightning Attention 7 : softmax attention 1, the residual stream in the norms.

The releases' own code rotates `rotary_dim` of a head's channels, half of them; transformers 5.23 reads no such option
and rotates all. Here the file is believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.minimax_m2 import (
    attention_options,
    attention_written,
    no_shared_experts,
)
from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    PRE_NORMS,
    QKVO,
    block_of_experts,
    outside,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, grouped, nothing, row, under, weights
from intarsia.errors import CheckpointError
from intarsia.mixers import AttentionConfig, LightningConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

KINDS = {LightningConfig: LINEAR, AttentionConfig: FULL}
SUBLAYERS = {"full_attn": "full_attention", "linear_attn": "linear_attention", "mlp": "mlp"}
"""What transformers calls the parts of a layer in its factors, and the releases."""
NORM_EPS = 1e-6
"""Of the norm in Lightning Attention, whatever the model's is."""


def kinds_of(options: Options) -> list[str]:
    """The layers. The releases list 0 for linear and 1 for softmax, transformers' files their names."""
    depth = options.get("num_hidden_layers", int)
    numbers: list[int] = options.get("attn_type_list", list, [])
    listed: list[str] = options.get("layer_types", list, [])
    if not (numbers or listed):
        raise CheckpointError(
            f"{options.where} has neither layer_types nor attn_type_list: transformers would alternate then, and the "
            "releases have one softmax layer in eight"
        )
    kinds = [{0: LINEAR, 1: FULL}.get(number, str(number)) for number in numbers]
    if kinds and listed and kinds != listed:
        raise options.unsupported("layer_types and attn_type_list say different layers")
    if len(kinds or listed) != depth:
        raise options.unsupported(f"its list of layers has {len(kinds or listed)}, and there are {depth}")
    return kinds or listed


def residual_scale(options: Options, kinds: list[str]) -> float:
    """The factor of the residual stream, one for all sublayers that there are."""
    there = ["mlp", *(["linear_attn"] if LINEAR in kinds else []), *(["full_attn"] if FULL in kinds else [])]
    scales = set()
    for short, long in SUBLAYERS.items():
        alpha = options.get(f"{short}_alpha_factor", float, 1.0, f"layernorm_{long}_alpha")
        beta = options.get(f"{short}_beta_factor", float, 1.0, f"layernorm_{long}_beta")
        if short in there:
            scales.add(alpha)
            if beta != 1:
                raise options.unsupported(
                    f"{short}_beta_factor is {beta}, and a layer's output has no factor"
                )
    if len(scales) > 1:
        raise options.unsupported(f"the residual stream has different factors in a layer: {sorted(scales)}")
    return scales.pop()


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("postnorm", True, part="residual stream that is not normed, with this family's factors")
    no_shared_experts(options)
    options.maybe("block_size", int)  # of how it is computed
    if options.has("use_qk_norm") or options.has("use_routing_bias"):
        raise options.unsupported(
            "this is a MiniMax-M2 under an older name: its model_type must be minimax_m2"
        )
    kinds = kinds_of(options)
    d_model, heads = options.get("hidden_size", int), options.get("num_attention_heads", int)
    head_dim = options.get("head_dim", int, d_model // heads)
    hidden = options.get("intermediate_size", int)
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=d_model,
        depth=len(kinds),
        layout=layout_of(kinds, {LINEAR: "lightning", FULL: "attention"}, options),
        mixers={
            "lightning": LightningConfig(heads, head_dim, norm_eps=NORM_EPS),
            "attention": attention_options(options, 1_000_000.0, head_dim),
        },
        feed_forward=FeedForwardConfig(hidden),
        experts=ExpertsConfig(
            num_experts=options.get("num_local_experts", int, 8, "num_experts"),
            d_hidden=hidden,
            num_active=options.get("num_experts_per_tok", int, 2),
            num_shared=0,
            scores="softmax",
            bias_update_rate=0,
        ),
        dense_layers=0,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-5),
        norm_placement="stream",
        residual_scale=residual_scale(options, kinds),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    of = the_experts(config)
    kinds = names_of(config, KINDS)
    factors: dict[str, float] = {}
    for short, long in SUBLAYERS.items():
        # In both spellings, for the releases' own code.
        for name in (f"{short}_alpha_factor", f"layernorm_{long}_alpha"):
            factors[name] = config.residual_scale
    return {
        **sizes_of(config),
        **attention_written(only_mixer(config, AttentionConfig)),
        **factors,
        "layer_types": kinds,
        "attn_type_list": [int(kind == FULL) for kind in kinds],
        "postnorm": True,
        "intermediate_size": of.d_hidden,
        "num_local_experts": of.num_experts,
        "num_experts_per_tok": of.num_active,
    }


def lightning(config: LightningConfig) -> Iterator[Row]:
    """Each head's query, key and value lie together."""
    K = config.head_dim
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    yield row(names, "qkv_proj.weight", grouped(config.num_heads, K, K, K))
    yield from weights({"output_gate_proj": "output_gate", "norm": "norm", "o_proj": "out_proj"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    of = the_experts(config)
    router = [row("router.weight", "gate.weight"), row("router.bias", (), nothing(of.num_experts))]
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        options = config.mixers[name]
        mixer = lightning(options) if isinstance(options, LightningConfig) else weights(QKVO)
        yield from under(ours + "mixer.", theirs + "self_attn.", mixer)
        yield from under(ours + "feed_forward.", theirs, block_of_experts(of, router))


FAMILY = Family(
    name="minimax",
    title="MiniMax-Text-01 and M1",
    model_types=("minimax", "minimax_text_01", "minimax_m1"),
    architecture="MiniMaxForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("lightning", "attention"),
    # transformers saves its tables of decays with the weights.
    computed=(".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay"),
)
