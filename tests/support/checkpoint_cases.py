"""Tiny models of published families, made by transformers' own classes, of awkward sizes.

One line a family and variant: the classes of transformers (of what it does not have, of this folder), and the options
that make it small. The sizes differ from each other wherever they may, so that nothing fits by chance.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints.options import Sparse
from support.published_model import PublishedConfig

VOCABULARY = 61


@dataclass(frozen=True)
class Case:
    """A tiny model of a family; `config` and `model` are the names of classes, of transformers or the `module`."""

    family: str
    variant: str
    config: str
    model: str
    options: dict[str, Any] = field(hash=False)
    renamed: tuple[tuple[str, str], ...] = ()
    """What transformers writes under names that no release has: a pattern, and what stands for it there."""
    sparse: Sparse = "published"
    """As `load` takes it."""
    module: str = "transformers"

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}"


COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
LINEAR, FULL = "linear_attention", "full_attention"
QWEN = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20,
    "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.3},
    "layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3,
}  # fmt: skip
QWEN_EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 28,
}  # fmt: skip

LATENT = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 11,
    "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 12, "intermediate_size": 52,
    "moe_intermediate_size": 12, "num_experts_per_tok": 3,
}  # fmt: skip
KIMI = {
    **LATENT, "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL], "linear_num_heads": 3,
    "linear_head_dim": 8, "num_local_experts": 6, "n_shared_experts": 2, "routed_scaling_factor": 1.7,
}  # fmt: skip
K3 = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 9,
    "kv_lora_rank": 11, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 12, "intermediate_size": 52,
    "mla_use_nope": True, "mla_use_output_gate": True, "moe_intermediate_size": 12, "num_experts": 6,
    "num_experts_per_token": 3, "num_shared_experts": 2, "num_expert_group": 1, "topk_group": 1,
    "moe_renormalize": True, "routed_scaling_factor": 1.7, "moe_router_activation_func": "sigmoid",
    "first_k_dense_replace": 1,
    "routed_expert_hidden_size": 20, "latent_moe_use_norm": True, "hidden_act": "situ", "activation_situ_beta": 0.4,
    "activation_situ_linear_beta": 0.6, "attn_res_block_size": 2, "num_hidden_layers": 5, "rms_norm_eps": 1e-4,
    "linear_attn_config": {
        "kda_layers": [1, 2, 4], "full_attn_layers": [3, 5], "num_heads": 3, "head_dim": 8,
        "short_conv_kernel_size": 3, "use_full_rank_gate": True, "gate_lower_bound": -3.0,
    },
}  # fmt: skip
DENSE_KIMI = ((r"layers\.0\.block_sparse_moe", "layers.0.mlp"),)
DEEPSEEK = {
    **LATENT, "num_hidden_layers": 3, "n_routed_experts": 6, "n_shared_experts": 2, "n_group": 3, "topk_group": 2,
    "first_k_dense_replace": 2, "routed_scaling_factor": 1.7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0,
    "mscale": 0.7, "mscale_all_dim": 1.3,
}  # fmt: skip
# With more tokens chosen than there are, every layer attends to all.
INDEXED = {**DEEPSEEK, "q_lora_rank": 9, "index_topk": 100, "index_n_heads": 3, "index_head_dim": 8}
# With few heads many pairs score nothing at all, and of those that are equal theirs takes any.
SPARSE = {**INDEXED, "index_topk": 12, "index_n_heads": 24}
LING = {
    **LATENT, "head_dim": 8, "num_local_experts": 6, "n_shared_experts": 1, "n_group": 3, "topk_group": 2,
    "routed_scaling_factor": 1.7, "rope_theta": 5000.0, "short_conv_kernel_size": 3,
}  # fmt: skip
LING_25 = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10,
    "q_lora_rank": 9, "kv_lora_rank": 11, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 12,
    "intermediate_size": 52, "moe_intermediate_size": 12, "num_experts": 6, "num_shared_experts": 1,
    "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
    "group_norm_size": 2, "linear_silu": False, "use_qk_norm": True, "partial_rotary_factor": 0.45,
    "rope_theta": 5000.0, "rms_norm_eps": 1e-4, "hidden_act": "silu", "score_function": "sigmoid",
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "router_dtype": "fp32", "norm_topk_prob": True,
}  # fmt: skip
# As 2.5, but for its attention.
LING_LINEAR = {
    **{
        name: value for name, value in LING_25.items() if name.partition("_")[0] not in ("q", "kv", "qk", "v")
    },
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "layer_group_size": 2,
}
OLMO = {
    **COMMON, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 52,
    "layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3, "linear_num_key_heads": 3,
    "linear_num_value_heads": 3, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
}  # fmt: skip
OLMO_NORMS = ((r"layers\.1\.feedforward_layer_norm", "layers.1.post_attention_layernorm"),)
LFM2 = {
    **COMMON, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 76,
    "block_multiple_of": 4, "num_hidden_layers": 4, "layer_types": ["conv", FULL, "conv", FULL],
}  # fmt: skip
MAMBA = {
    **COMMON, "hidden_size": 28, "num_heads": 6, "head_dim": 14, "expand": 3, "state_size": 10, "n_groups": 3,
    "num_hidden_layers": 3, "chunk_size": 16,
}  # fmt: skip
NEMOTRON = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "intermediate_size": 52, "mamba_num_heads": 6, "mamba_head_dim": 14, "n_groups": 3, "ssm_state_size": 10,
    "chunk_size": 16, "time_step_min": 1e-6,
}  # fmt: skip
NEMOTRON_EXPERTS = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 3, "topk_group": 2,
    "moe_shared_expert_intermediate_size": 28, "routed_scaling_factor": 1.7,
}  # fmt: skip
GRANITE = {
    **COMMON, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 12,
    "shared_intermediate_size": 28, "num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR],
    "mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 10, "mamba_expand": 2, "mamba_chunk_size": 16,
    "embedding_multiplier": 12.0, "logits_scaling": 0.49, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
}  # fmt: skip
FALCON = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 2, "mamba_d_ssm": 84, "mamba_n_heads": 6, "mamba_n_groups": 3,
    "mamba_d_state": 10, "mamba_chunk_size": 16, "key_multiplier": 0.39, "embedding_multiplier": 5.6,
    "lm_head_multiplier": 0.31, "mlp_multipliers": [0.88, 1.7], "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.94, "ssm_multipliers": [0.35, 1.5, 0.7, 1.4, 0.6], "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.24, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
MINIMAX = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "intermediate_size": 28, "num_local_experts": 5, "num_experts_per_tok": 3,
}  # fmt: skip
MINIMAX_M3 = {
    **MINIMAX, "intermediate_size": 12, "dense_intermediate_size": 28, "shared_intermediate_size": 20, "rotary_dim": 4,
    "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limit": 0.3, "swiglu_alpha": 1.4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.45},
}  # fmt: skip
M3_SPARSE = {
    "layer_types": [FULL, "minimax_m3_sparse", "minimax_m3_sparse"], "index_n_heads": 3, "index_head_dim": 8,
    "index_block_size": 8, "index_topk_blocks": 13,
}  # fmt: skip
M3_VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
}  # fmt: skip
MINIMAX_FACTORS = {"full_attn_alpha_factor": 1.7, "linear_attn_alpha_factor": 1.7, "mlp_alpha_factor": 1.7}
GLM_NEXT = {
    **LATENT, "num_hidden_layers": 4, "layer_types": [LINEAR, "indexed_attention", LINEAR, "indexed_attention"],
    "qk_rope_head_dim": 0, "q_lora_rank": 9, "n_routed_experts": 6, "n_shared_experts": 2, "n_group": 3,
    "topk_group": 2, "routed_scaling_factor": 1.7, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "linear_num_heads": 3, "linear_head_dim": 8, "linear_lower_bound": -3.0, "swiglu_limit": 0.2, "hc_mult": 3,
    "hc_sinkhorn_iters": 4, "hc_eps": 1e-3, "index_topk": 100, "index_kpool": 4, "index_n_heads": 4,
    "index_head_dim": 8, "rms_norm_eps": 1e-4,
}  # fmt: skip
# As SPARSE: pools of 4 tokens, 3 of which are read, and the layer behind one that chooses shares its choice.
GLM_SPARSE = {
    **GLM_NEXT,
    "index_topk": 12,
    "index_n_heads": 24,
    "indexer_types": ["full", "full", "shared", "full"],
    "layer_types": [LINEAR, "indexed_attention", "indexed_attention", LINEAR],
}
QWEN_NEXT = {
    **QWEN, **QWEN_EXPERTS, "layer_types": [LINEAR, "indexed_attention", LINEAR, "indexed_attention"],
    "num_hidden_layers": 4, "hc_count": 3, "hc_lowrank": 7, "indexer_n_heads": 24, "indexer_kv_heads": 1,
    "indexer_head_dim": 10, "indexer_budget": 12, "indexer_compress_ratio": 3,
}  # fmt: skip
SALA = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 4, "rms_norm_eps": 1e-4, "hidden_act": "silu",
    "mixer_types": ["minicpm4", "lightning-attn", "minicpm4", "lightning-attn"], "attention_bias": False,
    "attn_use_rope": False, "attn_use_output_gate": True, "lightning_nh": 4, "lightning_nkv": 4,
    "lightning_head_dim": 12, "lightning_scale": "1/sqrt(d)", "lightning_use_rope": True, "qk_norm": True,
    "use_output_gate": True, "use_output_norm": True, "rope_theta": 5000.0, "scale_emb": 3.0, "scale_depth": 1.4,
    "dim_model_base": 16, "tie_word_embeddings": False,
    "sparse_config": {
        "kernel_size": 4, "kernel_stride": 2, "init_blocks": 1, "block_size": 4, "window_size": 8, "topk": 3,
        "use_nope": False,
    },
}  # fmt: skip
GLM_VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 40, "intermediate_size": 20,
    "projection_intermediate_size": 24, "image_size": 28,
}  # fmt: skip
RWKV = {
    "vocab_size": VOCABULARY, "hidden_size": 30, "num_hidden_layers": 3, "head_dim": 10, "num_heads": 3,
    "decay_low_rank_dim": 5, "a_low_rank_dim": 6, "gate_low_rank_dim": 7, "v_low_rank_dim": 4, "hidden_ratio": 4.0,
    "intermediate_size": 52, "hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "norm_eps": 1e-5,
    "attn": None, "attn_mode": "chunk", "tie_word_embeddings": False,
}  # fmt: skip

CASES = [
    Case(
        "qwen3_5", "tied", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
        {**QWEN, "intermediate_size": 52, "tie_word_embeddings": True},
    ),
    Case(
        "qwen3_5", "biased", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
        {**QWEN, "intermediate_size": 52, "attention_bias": True, "linear_conv_kernel_dim": 3},
    ),
    Case("qwen3_5_moe", "", "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**QWEN, **QWEN_EXPERTS}),
    Case(
        "kimi_linear", "grouped", "KimiLinearConfig", "KimiLinearForCausalLM", {**KIMI, "n_group": 3, "topk_group": 2},
        DENSE_KIMI,
    ),
    Case(
        "kimi_linear", "low", "KimiLinearConfig", "KimiLinearForCausalLM",
        {**KIMI, "q_lora_rank": 9, "norm_topk_prob": False}, DENSE_KIMI,
    ),
    Case("kimi_linear", "k3", "PublishedConfig", "PublishedK3", K3, module="support.published_k3"),
    Case(
        "kimi_linear", "k3-other", "PublishedConfig", "PublishedK3",
        {
            **K3, "activation_situ_beta": 1.0, "activation_situ_linear_beta": None, "latent_moe_use_norm": False,
            "attn_res_block_size": 3, "num_hidden_layers": 4, "mla_use_output_gate": False, "q_lora_rank": None,
            "linear_attn_config": {
                **K3["linear_attn_config"], "kda_layers": [1, 4], "full_attn_layers": [2, 3],  # type: ignore[dict-item]
            },
        },
        module="support.published_k3",
    ),
    Case(
        "kimi_linear", "dense", "KimiLinearConfig", "KimiLinearForCausalLM",
        {**KIMI, "mlp_layer_types": ["dense"] * KIMI["num_hidden_layers"]},
        ((r"block_sparse_moe", "mlp"),),
    ),
    Case("qwen3_next", "", "Qwen3NextConfig", "Qwen3NextForCausalLM", {**QWEN, **QWEN_EXPERTS}),
    Case(
        "qwen3_next", "dense", "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**QWEN, **QWEN_EXPERTS, "mlp_only_layers": [0, 1], "intermediate_size": 44, "norm_topk_prob": False},
    ),
    Case(
        "qwen3_next", "without", "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**QWEN, "num_experts": 0, "mlp_only_layers": [0, 1, 2], "intermediate_size": 44},
    ),
    Case(
        "gpt_oss", "", "GptOssConfig", "GptOssForCausalLM",
        {
            **COMMON, "hidden_size": 40, "intermediate_size": 28, "num_hidden_layers": 4, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 3,
            "sliding_window": 13,
        },
    ),
    Case("deepseek_v3", "low", "DeepseekV3Config", "DeepseekV3ForCausalLM", {**DEEPSEEK, "q_lora_rank": 9}),
    Case(
        "deepseek_v3", "moonlight", "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Case(  # without experts, whose choice hangs on the last bit
        "deepseek_v3", "stretched", "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK, "q_lora_rank": 9, "rope_parameters": YARN, "max_position_embeddings": 64,
            "first_k_dense_replace": 3,
        },
    ),
    Case(
        "deepseek_v32", "", "DeepseekV32Config", "DeepseekV32ForCausalLM",
        {**SPARSE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 64},
    ),
    Case(
        "deepseek_v32", "dense", "DeepseekV32Config", "DeepseekV32ForCausalLM",
        {**INDEXED, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "max_position_embeddings": 64},
        sparse="dense",
    ),
    Case(
        "bailing_hybrid", "", "BailingHybridConfig", "BailingHybridForCausalLM",
        {**LING, "num_hidden_layers": 6, "layer_group_size": 3, "kda_lower_bound": -3.0},
    ),
    Case(
        "bailing_hybrid", "unbounded", "BailingHybridConfig", "BailingHybridForCausalLM",
        {
            **LING, "num_hidden_layers": 3, "layer_types": [FULL, LINEAR, LINEAR], "kda_safe_gate": False,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": False,
        },
    ),
    Case(  # the last layer is behind the last whole group
        "bailing_hybrid", "lightning", "PublishedConfig", "PublishedLing25",
        {**LING_25, "num_hidden_layers": 5, "layer_group_size": 2}, module="support.published_ling25",
    ),
    Case(
        "bailing_hybrid", "lightning-other", "PublishedConfig", "PublishedLing25",
        {
            **LING_25, "num_hidden_layers": 3, "layer_group_size": 3, "use_qk_norm": False, "linear_silu": True,
            "q_lora_rank": None, "num_shared_experts": 2, "first_k_dense_replace": 2,
        },
        module="support.published_ling25",
    ),
    Case(
        "bailing_moe_linear", "", "PublishedConfig", "PublishedLingLinear", LING_LINEAR,
        module="support.published_ling25",
    ),
    Case(
        "bailing_moe_linear", "other", "PublishedConfig", "PublishedLingLinear",
        {
            **LING_LINEAR, "num_hidden_layers": 3, "layer_group_size": 3, "use_qk_norm": False, "linear_silu": True,
            "num_shared_experts": 2, "first_k_dense_replace": 2, "norm_topk_prob": True,
        },
        module="support.published_ling25",
    ),
    Case(
        "glm_moe_dsa", "", "GlmMoeDsaConfig", "GlmMoeDsaForCausalLM",
        {**SPARSE, "n_group": 1, "topk_group": 1, "num_hidden_layers": 4, "indexer_types": ["full", "shared"] * 2},
    ),
    Case(
        "glm_moe_dsa", "dense", "GlmMoeDsaConfig", "GlmMoeDsaForCausalLM",
        {**INDEXED, "n_group": 1, "topk_group": 1, "index_topk_freq": 2}, sparse="dense",
    ),
    Case(
        "olmo_hybrid", "", "OlmoHybridConfig", "OlmoHybridForCausalLM",
        {**OLMO, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, OLMO_NORMS,
    ),
    Case(
        "olmo_hybrid", "nope", "OlmoHybridConfig", "OlmoHybridForCausalLM", {**OLMO, "attention_bias": True},
        OLMO_NORMS,
    ),
    Case(
        "minimax", "", "MiniMaxConfig", "MiniMaxForCausalLM",
        {
            **MINIMAX, **MINIMAX_FACTORS, "layer_types": [LINEAR, LINEAR, FULL], "num_hidden_layers": 3,
            "block_size": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    Case(
        "minimax_m2", "", "MiniMaxM2Config", "MiniMaxM2ForCausalLM",
        {
            **MINIMAX, "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.45},
        },
    ),
    Case(
        "minimax_m2", "tied", "MiniMaxM2Config", "MiniMaxM2ForCausalLM",
        {
            **MINIMAX, "num_hidden_layers": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    Case("minimax_m3", "", "MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", MINIMAX_M3),
    Case(
        "minimax_m3", "sparse", "MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM",
        {**MINIMAX_M3, **M3_SPARSE, "index_block_size": 4, "index_topk_blocks": 5, "index_local_blocks": 2},
    ),
    Case(
        "minimax_m3", "dense", "MiniMaxM3VLConfig", "MiniMaxM3SparseForConditionalGeneration",
        {"text_config": {**MINIMAX_M3, **M3_SPARSE}, "vision_config": M3_VISION, "projector_hidden_size": 24},
        sparse="dense",
    ),
    Case("lfm2", "", "Lfm2Config", "Lfm2ForCausalLM", LFM2),
    Case(
        "lfm2", "biased", "Lfm2Config", "Lfm2ForCausalLM",
        {
            **LFM2, "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False,
            "block_auto_adjust_ff_dim": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    Case(
        "lfm2_moe", "", "Lfm2MoeConfig", "Lfm2MoeForCausalLM",
        {
            **{name: value for name, value in LFM2.items() if not name.startswith("block")}, "num_dense_layers": 1,
            "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "routed_scaling_factor": 1.7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "tie_word_embeddings": False,
        },
    ),
    Case(
        "nemotron_h", "", "NemotronHConfig", "NemotronHForCausalLM",
        {**NEMOTRON, "layers_block_type": [LINEAR, "mlp", LINEAR, FULL, "mlp", "mlp"]},
    ),
    Case(
        "nemotron_h", "latent", "NemotronHConfig", "NemotronHForCausalLM",
        {
            **NEMOTRON, **NEMOTRON_EXPERTS, "layers_block_type": [LINEAR, FULL, "moe", LINEAR, "moe"],
            "moe_latent_size": 20, "use_conv_bias": False, "use_bias": True, "conv_kernel": 3,
        },
    ),
    Case(
        "nemotron_h", "mixed", "NemotronHConfig", "NemotronHForCausalLM",
        {
            **NEMOTRON, **NEMOTRON_EXPERTS, "layers_block_type": [FULL, "mlp", LINEAR, "moe"],
            "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "layer_norm_epsilon": 1e-4,
        },
    ),
    Case(
        "granitemoehybrid", "", "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
        {**GRANITE, "num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    Case(
        "granitemoehybrid", "dense", "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
        {
            **GRANITE, "num_local_experts": 0, "mamba_proj_bias": True, "mamba_conv_bias": False,
            "attention_bias": True, "position_embedding_type": "rope", "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    Case("falcon_h1", "", "FalconH1Config", "FalconH1ForCausalLM", {**FALCON, "mamba_norm_before_gate": False}),
    Case(
        "falcon_h1", "normed", "FalconH1Config", "FalconH1ForCausalLM",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False},
    ),
    Case(
        "falcon_h1", "biased", "FalconH1Config", "FalconH1ForCausalLM",
        {
            **FALCON, "mamba_rms_norm": True, "mamba_proj_bias": True, "projectors_bias": True,
            "attention_bias": True, "ssm_in_multiplier": 1.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-4,
        },
    ),
    Case("mamba2", "", "Mamba2Config", "Mamba2ForCausalLM", MAMBA),
    Case(
        "mamba2", "biased", "Mamba2Config", "Mamba2ForCausalLM",
        {
            **MAMBA, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "n_groups": 1,
            "conv_kernel": 3, "time_step_limit": [0.3, 0.9], "layer_norm_epsilon": 1e-4,
        },
    ),
    Case(
        "glm5_next", "", "Glm5NextConfig", "Glm5NextForConditionalGeneration",
        {"text_config": GLM_SPARSE, "vision_config": GLM_VISION},
    ),
    Case(
        "glm5_next", "unbounded", "Glm5NextConfig", "Glm5NextForConditionalGeneration",
        {
            "text_config": {
                **GLM_NEXT, "index_topk": 18, "index_kpool": 6, "index_n_heads": 24, "linear_lower_bound": None,
                "linear_conv_kernel_dim": 3, "n_shared_experts": 1, "norm_topk_prob": False,
                "tie_word_embeddings": True,
            },
            "vision_config": GLM_VISION, "tie_word_embeddings": True,
        },
    ),
    Case(
        "glm5_next", "dense", "Glm5NextConfig", "Glm5NextForConditionalGeneration",
        {"text_config": GLM_NEXT, "vision_config": GLM_VISION}, sparse="dense",
    ),
    Case("qwen4_exp", "", "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", QWEN_NEXT),
    Case(
        "qwen4_exp", "sigmoid", "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
        {
            **QWEN_NEXT, "layer_types": None, "output_gate_type": "sigmoid", "tie_word_embeddings": True,
            "attention_bias": True, "hc_count": 2, "indexer_compress_ratio": 4, "rms_norm_eps": 1e-4,
        },
    ),
    Case(
        "qwen4_exp", "dense", "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
        {**QWEN_NEXT, "indexer_budget": 72, "num_experts_per_tok": 5}, sparse="dense",
    ),
    Case("minicpm_sala", "", "PublishedConfig", "PublishedSALA", SALA, module="support.published_sala"),
    Case(
        "minicpm_sala", "tied", "PublishedConfig", "PublishedSALA",
        {
            **SALA, "tie_word_embeddings": True, "qk_norm": False, "lightning_scale": "1/d",
            "lightning_use_rope": False, "attn_use_output_gate": False, "dim_model_base": 20,
        },
        module="support.published_sala",
    ),
    Case(
        "rwkv7", "", "PublishedConfig", "PublishedRWKV7",
        {**RWKV, "value_dim": [60] * 3}, module="support.published_rwkv7",
    ),
]  # fmt: skip


def their_class(case: Case, name: str) -> Any:
    """The class that computes the case, or that of its options."""
    if name == "PublishedConfig":
        return PublishedConfig
    return getattr(importlib.import_module(case.module), name)


def their_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the case, in evaluation mode, with weights that are large enough to tell everything,
    rounded to `dtype`."""
    model = _made(case)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


@cache
def _made(case: Case) -> Any:
    config = their_class(case, case.config)(**case.options)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = their_class(case, case.model)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *_corrections(model)):
            noise = torch.randn(tensor.shape, generator=generator)
            # Norms, decays and biases stay near what they begin with.
            tensor.copy_(tensor + 0.1 * noise if tensor.dim() == 1 else 0.15 * noise)
    return model


def _corrections(model: Any) -> list[Tensor]:
    """Buffers that files hold: of routers."""
    ends = ("e_score_correction_bias", "expert_bias")
    return [buffer for name, buffer in model.named_buffers() if name.endswith(ends)]


def their_folder(case: Case, path: Path, runtime: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """The case, saved by transformers in the released layout or in that of its modules."""
    their_model(case, dtype).save_pretrained(path, save_original_format=not runtime)
    return path


def tokens(count: int) -> Tensor:
    """`[2, count]`"""
    return torch.randint(VOCABULARY, (2, count), generator=torch.Generator().manual_seed(1))
