"""DeepSeek-V3.2: DeepSeek-V3 whose layers attend to some tokens that an indexer chooses. Read as if they chose all."""

from __future__ import annotations

from intarsia.checkpoints.families import deepseek_v3
from intarsia.checkpoints.family import Family
from intarsia.checkpoints.options import Options
from intarsia.model.config import ModelConfig

INDEXER = {".self_attn.indexer.": "the indexers of sparse attention"}


def read(options: Options) -> ModelConfig:
    options.chooses(options.get("index_topk", int, 2048))
    for name in options.values:
        if name.startswith("index"):
            options.maybe(name, object)
    options.only("mlp_bias", False, part="feed-forward with biases")
    kinds = ["indexed_attention"] * options.get("num_hidden_layers", int)
    options.only("layer_types", kinds, part="other attention in this family")
    return deepseek_v3.read(options)


FAMILY = Family(
    name="deepseek_v32",
    title="DeepSeek-V3.2",
    model_types=("deepseek_v32",),
    architecture="DeepseekV32ForCausalLM",
    read=read,
    write=None,
    rows=deepseek_v3.rows,
    left_out=INDEXER,
    missing='sparse attention: loaded as dense if asked (`sparse="dense"`), saved as `deepseek_v3`',
)
