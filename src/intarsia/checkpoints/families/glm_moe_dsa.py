"""GLM-5: as DeepSeek-V3.2, of other sizes; some layers share what the indexer of an earlier one has picked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families import deepseek_v3, deepseek_v32
from intarsia.checkpoints.families.deepseek_v32 import KINDS, as_dense, indexer_options, with_indexers
from intarsia.checkpoints.family import Family, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row
from intarsia.errors import UnsupportedError
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.mla import MLAConfig
from intarsia.model.config import ModelConfig


def indexer_kinds(options: Options, depth: int, first: int = 0) -> list[str]:
    """Which of so many layers have an indexer (`full`), and which read what an earlier one picked (`shared`): said one
    by one, by a pattern of letters, or by how many layers read one choice. `first` is the first that chooses."""
    every, offset = options.get("index_topk_freq", int, 1), options.get("index_skip_topk_offset", int, 2)
    kinds = ["shared" if max(layer - offset + 1, 0) % max(every, 1) else "full" for layer in range(depth)]
    pattern = options.maybe("index_topk_pattern", object)
    if isinstance(pattern, str):
        kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    elif pattern is not None:
        kinds = options.get("index_topk_pattern", list)
    kinds = options.get("indexer_types", list, kinds)
    if len(kinds) != depth or not set(kinds) <= set(KINDS) or kinds[first] != "full":
        which = "the first" if first == 0 else f"layer {first}, the first that chooses,"
        raise options.unsupported(
            f"its {depth} layers must each be 'full' or 'shared', and {which} has an indexer; got {kinds}"
        )
    return kinds


def read(options: Options) -> ModelConfig:
    options.presume(
        q_lora_rank=2048, qk_nope_head_dim=192, v_head_dim=256, intermediate_size=12288, n_group=1, topk_group=1,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    depth = options.get("num_hidden_layers", int)
    options.only("mlp_bias", False, part="feed-forward with biases")
    options.only("layer_types", ["indexed_attention"] * depth, part="other attention in this family")
    if as_dense(options, options.get("index_topk", int, 2048)):
        return deepseek_v3.read(options)
    options.only(
        "indexer_rope_interleave", True, part="order of an indexer's rotated channels other than GLM's"
    )
    config = deepseek_v3.read(options)
    dsa = indexer_options(options, only_mixer(config, MLAConfig), 32)
    return with_indexers(config, dsa, indexer_kinds(options, depth))


def write(config: ModelConfig) -> dict[str, Any]:
    mixers = [config.mixers[name] for name in config.layers]
    found = [mixer for mixer in mixers if isinstance(mixer, DSAConfig)]
    if len(found) < len(mixers) or len({dataclasses.replace(each, shares=False) for each in found}) != 1:
        raise UnsupportedError(
            "the family's layers are all of 'dsa', and differ in nothing but what they share"
        )
    kinds = ["shared" if mixer.shares else "full" for mixer in found]
    return {**deepseek_v32.written(config, found[0]), "indexer_types": kinds}


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    return deepseek_v32.rows_of(config, pairs=True)


FAMILY = Family(
    name="glm_moe_dsa",
    title="GLM-5",
    model_types=("glm_moe_dsa",),
    architecture="GlmMoeDsaForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("dsa",),
    left_out=deepseek_v32.INDEXER,
)
