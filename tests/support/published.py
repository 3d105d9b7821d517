"""The published models that presets are named after: transformers' configurations of them, and small ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def theirs(name: str, **changes: Any) -> Any:
    """transformers' configuration of the published model: its class's defaults, and where the release says another,
    that. `changes` come on top."""
    import transformers as hf

    if name == "kimi-linear":
        full = (4, 8, 12, 16, 20, 24, 27)  # counted from 1, as in the release
        lists = {
            "full_attn_layers": full,
            "kda_layers": [layer for layer in range(1, 28) if layer not in full],
            "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        }  # fmt: skip
        return hf.KimiLinearConfig(
            **{"linear_attn_config": lists, "num_key_value_heads": 32, "head_dim": 72} | changes
        )
    if name == "qwen3-next":
        rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
        return hf.Qwen3NextConfig(**{"rope_parameters": rope} | changes)
    if name == "gpt-oss":
        return hf.GptOssConfig(**changes)
    if name == "gpt-oss-20b":
        return hf.GptOssConfig(**{"num_hidden_layers": 24, "num_local_experts": 32} | changes)
    if name == "olmo-hybrid":
        # What it was trained with first; the release has None, which is no rotation.
        rope = {"rope_type": "default", "rope_theta": 500_000.0}
        return hf.OlmoHybridConfig(**{"rope_parameters": rope} | changes)
    if name == "minimax-01":
        layers = ["linear_attention"] * 7 + ["full_attention"]
        values = {
            "vocab_size": 200064, "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 32,
            "layer_types": layers * 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
            "full_attn_alpha_factor": 3.5565588200778455, "linear_attn_alpha_factor": 3.5565588200778455,
            "mlp_alpha_factor": 3.5565588200778455,
        }  # fmt: skip
        return hf.MiniMaxConfig(**values | changes)
    if name == "moonlight":
        values = {
            "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
            "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
            "n_routed_experts": 64, "kv_lora_rank": 512, "q_lora_rank": None, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }  # fmt: skip
        return hf.DeepseekV3Config(**values | changes)
    if name == "deepseek-v3.2":
        rope = {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        }  # fmt: skip
        return hf.DeepseekV32Config(**{"rope_parameters": rope} | changes)
    if name == "glm-5.3-flash":
        # The class's pools are of 16 tokens, the release's of 4.
        return hf.Glm5NextConfig(text_config={"index_kpool": 4} | changes, vision_config={"depth": 0})
    if name == "qwen3.8-flash-next":
        rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
        values = {
            "vocab_size": 248320, "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24,
            "num_key_value_heads": 2, "linear_num_value_heads": 48, "moe_intermediate_size": 640,
            "shared_expert_intermediate_size": 640, "indexer_n_heads": 4, "indexer_kv_heads": 1,
            "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4, "rope_parameters": rope,
        }  # fmt: skip
        return hf.Qwen4ExpTextConfig(**values | changes)
    raise AssertionError(name)


SALA: dict[str, Any] = {
    "vocab_size": 73448, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 16384, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu", "attention_bias": False, "attn_use_rope": False, "attn_use_output_gate": True,
    "qk_norm": True, "use_output_gate": True, "use_output_norm": True, "lightning_nh": 32, "lightning_nkv": 32,
    "lightning_head_dim": 128, "lightning_scale": "1/sqrt(d)", "lightning_use_rope": True, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 256, "mup_denominator": 32, "tie_word_embeddings": False,
    "max_position_embeddings": 524288, "model_type": "minicpm_sala",
    "mixer_types": [
        "minicpm4" if layer in (0, 9, 16, 17, 22, 29, 30, 31) else "lightning-attn" for layer in range(32)
    ],
    "sparse_config": {
        "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048, "topk": 64,
        "use_nope": False, "dense_len": 8192,
    },
}  # fmt: skip
"""MiniCPM-SALA's `config.json`, but for what says nothing of the model."""


def shrunk(value: Any, changes: Mapping[str, int]) -> Any:
    """The options with everything wide made narrow."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: changes[key] if key in changes and isinstance(inner, int) else shrunk(inner, changes)
        for key, inner in value.items()
    }
