"""GLM-5: as DeepSeek-V3.2, of other sizes; some layers share what the indexer of an earlier one has chosen."""

from __future__ import annotations

from intarsia.checkpoints.families import deepseek_v3, deepseek_v32
from intarsia.checkpoints.family import Family
from intarsia.checkpoints.options import Options
from intarsia.model.config import ModelConfig


def read(options: Options) -> ModelConfig:
    options.presume(
        q_lora_rank=2048, qk_nope_head_dim=192, v_head_dim=256, intermediate_size=12288, n_group=1, topk_group=1,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    return deepseek_v32.read(options)


FAMILY = Family(
    name="glm_moe_dsa",
    title="GLM-5",
    model_types=("glm_moe_dsa",),
    architecture="GlmMoeDsaForCausalLM",
    read=read,
    write=None,
    rows=deepseek_v3.rows,
    left_out=deepseek_v32.INDEXER,
    missing=deepseek_v32.FAMILY.missing,
)
