"""DeepSeek-V3.2: DeepSeek-V3 whose layers attend to the tokens that an indexer picks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from intarsia.checkpoints.families import deepseek_v3
from intarsia.checkpoints.families.deepseek_v3 import feed_forward, latent_attention
from intarsia.checkpoints.families.parts import PRE_NORMS, outside
from intarsia.checkpoints.family import Family, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, halves_of_pairs, row, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.mla import MLAConfig
from intarsia.model.config import ModelConfig

INDEXER = {".self_attn.indexer.": "the indexers of sparse attention"}
KINDS = {"full": "dsa", "shared": "shared"}
"""What layers are called that have an indexer, and that read what an earlier one picked: theirs and ours."""


def as_dense(options: Options, count: int) -> bool:
    """Whether layers shall attend to all tokens; what is said of their indexers is passed over then."""
    if not options.attends_to_all(count):
        return False
    for name in options.values:
        if name.startswith("index"):
            options.maybe(name, object)
    return True


def indexer_options(options: Options, latent: MLAConfig, heads: int, pool: int = 1) -> DSAConfig:
    """Latent attention with an indexer, which looks at `pool` tokens at once; so many `heads` where the file says
    nothing."""
    return DSAConfig(
        **{field.name: getattr(latent, field.name) for field in dataclasses.fields(latent)},
        top_k=options.get("index_topk", int, 2048),
        index_heads=options.get("index_n_heads", int, heads),
        index_dim=options.get("index_head_dim", int, 128),
        index_pool=pool,
    )


def with_indexers(config: ModelConfig, dsa: DSAConfig, kinds: Sequence[str]) -> ModelConfig:
    """The model whose layers have this attention, of these kinds of theirs."""
    mixers = {"dsa": dsa, "shared": dataclasses.replace(dsa, shares=True)}
    names = [KINDS[kind] for kind in kinds]
    return dataclasses.replace(
        config, layout=" ".join(names), mixers={name: mixers[name] for name in dict.fromkeys(names)}
    )


def read(options: Options) -> ModelConfig:
    depth = options.get("num_hidden_layers", int)
    options.only("mlp_bias", False, part="feed-forward with biases")
    options.only("layer_types", ["indexed_attention"] * depth, part="other attention in this family")
    if as_dense(options, options.get("index_topk", int, 2048)):
        return deepseek_v3.read(options)
    config = deepseek_v3.read(options)
    dsa = indexer_options(options, only_mixer(config, MLAConfig), 64)
    return with_indexers(config, dsa, ["full"] * depth)


def indexer_written(dsa: DSAConfig) -> dict[str, Any]:
    """`indexer_options` the other way round."""
    if not dsa.index_relu or dsa.index_norm_eps != 1e-6:
        raise UnsupportedError("the family's indexers have a ReLU, and norms with an epsilon of 1e-6")
    return {"index_topk": dsa.top_k, "index_n_heads": dsa.index_heads, "index_head_dim": dsa.index_dim}


def written(config: ModelConfig, dsa: DSAConfig) -> dict[str, Any]:
    """All but which layers share."""
    return {**deepseek_v3.written(config, dsa), **indexer_written(dsa)}


def write(config: ModelConfig) -> dict[str, Any]:
    return written(config, only_mixer(config, DSAConfig))


def indexer(config: DSAConfig, pairs: bool) -> Iterator[Row]:
    """`pairs` says that neighbouring channels are rotated as a pair, as in the rest of latent attention."""
    turned = config.rope_dim if config.rotate else 0
    rows = {"q_proj": "wq_b", "k_proj": "wk", "k_norm": "k_norm"}
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in rows.items()}
    names["k_norm.bias"] = "k_norm.bias"
    for ours, theirs in names.items():
        if pairs and turned:
            heads = config.index_heads if ours == "q_proj.weight" else 1
            yield row(ours, theirs, halves_of_pairs(heads, 0, turned, config.index_dim - turned))
        else:
            yield row(ours, theirs)
    yield from weights({"head_weights": "weights_proj"})
    if config.index_pool > 1:
        yield row("pool_gate.weight", "index_kpool_compress_gate")
        yield row("pool_places", "index_kpool_compress_ape")


def rows_of(config: ModelConfig, pairs: bool) -> Iterator[Row | Either]:
    """As DeepSeek-V3's, with indexers where layers have them."""
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        mixer = config.mixers[name]
        assert isinstance(mixer, MLAConfig)
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours + "mixer.", theirs + "self_attn.", latent_attention(mixer))
        if isinstance(mixer, DSAConfig) and not mixer.shares:
            yield from under(ours + "mixer.indexer.", theirs + "self_attn.indexer.", indexer(mixer, pairs))
        yield from under(ours + "feed_forward.", theirs + "mlp.", feed_forward(config, layer))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    """The indexer's channels are rotated as ours, whatever the rest of the layer does."""
    return rows_of(config, pairs=False)


FAMILY = Family(
    name="deepseek_v32",
    title="DeepSeek-V3.2",
    model_types=("deepseek_v32",),
    architecture="DeepseekV32ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("dsa",),
    left_out=INDEXER,
)
