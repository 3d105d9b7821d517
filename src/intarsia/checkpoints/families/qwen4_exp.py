"""Qwen3.8-Flash-Next: as Qwen3.5 with experts, but its attention reads pools of tokens that an indexer chooses (`qsa`),
and several residual streams are read through gates of low rank, in place of norms before each part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from intarsia.checkpoints.families.parts import FULL, LINEAR, MTP, VISION, the_experts
from intarsia.checkpoints.families.qwen3_5 import attention_options, common_written, linear_options, mixers
from intarsia.checkpoints.families.qwen3_5_moe import expert_options, experts_written, sparse
from intarsia.checkpoints.family import Family, layout_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, row, split, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, MixerConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.model.config import FeedForwardConfig, HyperConnectionsConfig, ModelConfig

INDEXED = "indexed_attention"
INDEXER = {".self_attn.indexer.": "the indexers of sparse attention"}
KINDS: Mapping[type[MixerConfig], str] = {GatedDeltaNetConfig: LINEAR, QSAConfig: INDEXED}
NORMS = {"mixer_norm": "attn_hyper_connection.hc_norm", "feed_forward_norm": "mlp_hyper_connection.hc_norm"}
STREAMS = {"mixer_streams": "attn_hyper_connection", "feed_forward_streams": "mlp_hyper_connection"}
READING = {"read_down": "input_mix_weight_down", "read_up": "input_mix_weight_up"}
NGRAMS = (
    "ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by", "seed",
    "split_ngram_parts", "ple_embed_dim", "ple_conv_kernel_size", "number_of_conv_states",
)  # fmt: skip
"""Of no meaning without a layer that embeds n-grams."""


def layer_kinds(options: Options) -> list[str]:
    """`layer_types`; the release calls the layers that choose full attention."""
    depth = options.get("num_hidden_layers", int, 40)
    interval = options.get("full_attention_interval", int, 4)
    default = [LINEAR if (layer + 1) % interval else INDEXED for layer in range(depth)]
    kinds: list[str] = options.get("layer_types", list, default)
    if len(kinds) != depth:
        raise options.unsupported(f"layer_types has {len(kinds)} layers, and num_hidden_layers is {depth}")
    return [INDEXED if kind == FULL else kind for kind in kinds]


def chosen_options(options: Options, attention: AttentionConfig) -> AttentionConfig:
    """Attention with its indexer, or without one where that is asked for."""
    options.only("indexer_kv_heads", 1, part="indexer with several key heads")
    budget, ratio = options.get("indexer_budget", int), options.get("indexer_compress_ratio", int)
    heads, dim = options.get("indexer_n_heads", int), options.get("indexer_head_dim", int)
    if options.attends_to_all(budget):
        return attention
    same = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
    return QSAConfig(**same, index_heads=heads, index_dim=dim, index_budget=budget, index_ratio=ratio)


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("ple_layer_ids", [], part="embedding of hashed n-grams inside layers")
    for name in NGRAMS:
        options.maybe(name, object)
    options.only(
        "norm_topk_prob", True, part="experts whose weights are not divided by their sum in this family"
    )
    options.presume(num_attention_heads=16, num_key_value_heads=2)
    kinds, experts = layer_kinds(options), expert_options(options, 512, 10)
    gate = options.get("output_gate_type", str, "silu")
    if gate not in ("silu", "sigmoid"):
        raise options.unsupported(f"output_gate_type is {gate!r}; known are 'silu' and 'sigmoid'")
    gdn = dataclasses.replace(linear_options(options), output_gate="swish" if gate == "silu" else "sigmoid")
    attention = chosen_options(options, attention_options(options))
    streams = HyperConnectionsConfig(
        options.get("hc_count", int, 4), rank=options.get("hc_lowrank", int, 320)
    )
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 248320),
        d_model=options.get("hidden_size", int, 2048),
        depth=len(kinds),
        layout=layout_of(kinds, {LINEAR: "gdn", INDEXED: attention.type}, options),
        mixers={"gdn": gdn, attention.type: attention},
        feed_forward=FeedForwardConfig(experts.d_hidden),
        experts=experts,
        dense_layers=0,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        zero_centered_norms=True,
        hyper_connections=streams,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    qsa, hyper = only_mixer(config, QSAConfig), config.hyper_connections
    if hyper is None or hyper.rank is None:
        raise UnsupportedError("the family has several residual streams that are read through gates")
    gate = only_mixer(config, GatedDeltaNetConfig).output_gate
    return {
        **common_written(config, KINDS),
        **experts_written(config),
        "output_gate_type": "silu" if gate == "swish" else gate,
        "indexer_n_heads": qsa.index_heads,
        "indexer_kv_heads": 1,
        "indexer_head_dim": qsa.index_dim,
        "indexer_budget": qsa.index_budget,
        "indexer_compress_ratio": qsa.index_ratio,
        "hc_count": hyper.streams,
        "hc_lowrank": hyper.rank,
    }


def indexer(config: QSAConfig) -> Iterator[Row]:
    """One projection makes its queries and its key."""
    both = ("q_proj.weight", "k_proj.weight")
    yield row(both, "index_qk_proj.weight", split(config.index_heads * config.index_dim, config.index_dim))
    yield from weights({"q_norm": "q_layernorm", "k_norm": "k_layernorm"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield row("embed.weight", "model.embed_tokens.weight")
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")
    last = "model.hyper_connection_mixer."
    yield row("norm.weight", f"{last}hc_norm.weight")
    yield from under("output_streams.", last, weights(READING))
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from mixers(config, layer, norms=NORMS)
        for part, there in STREAMS.items():
            both = weights({**READING, "write_proj": "block_inject_weight"})
            yield from under(f"{ours}{part}.", f"{theirs}{there}.", both)
        options = config.mixers[name]
        if isinstance(options, QSAConfig):
            yield from under(f"{ours}mixer.indexer.", f"{theirs}self_attn.indexer.", indexer(options))
        yield from under(f"{ours}feed_forward.", f"{theirs}mlp.", sparse(the_experts(config)))


FAMILY = Family(
    name="qwen4_exp_text",
    title="Qwen3.8-Flash-Next",
    model_types=("qwen4_exp_text", "qwen4_exp"),
    architecture="Qwen4ExpForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("gdn", "qsa"),
    left_out={**VISION, **MTP, **INDEXER},
    missing="embeddings of hashed n-grams inside layers (`ple_layer_ids`), which the released model has in one",
)
