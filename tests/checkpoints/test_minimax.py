"""What the releases of MiniMax say otherwise than transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia
from intarsia.checkpoints.family import told
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family_of
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.mixers import AttentionConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig
from intarsia.model.published import minimax_text_01
from support.checkpoint_cases import CASES, their_folder, their_model, tokens

pytest.importorskip("transformers")

CASE = next(case for case in CASES if case.family == "minimax")
RELEASED_TEXT_01: dict[str, Any] = {
    "architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01", "vocab_size": 200064,
    "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 10000000, "hidden_act": "silu",
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10, "num_local_experts": 32, "num_experts_per_tok": 2,
    "layernorm_full_attention_alpha": 3.5565588200778455, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0, "postnorm": True, "rms_norm_eps": 1e-5,
    "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "max_position_embeddings": 10240000,
}  # fmt: skip
RELEASED_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "vocab_size": 200064, "hidden_size": 3072,
    "intermediate_size": 1536, "mlp_intermediate_size": 8192, "num_hidden_layers": 62, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 5000000, "hidden_act": "silu",
    "attn_type_list": [1] * 62, "num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid",
    "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6,
    "use_mtp": True, "num_mtp_modules": 3, "mtp_transformer_layers": 1, "tie_word_embeddings": False,
    "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
    "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
}  # fmt: skip


def config_of(values: dict[str, Any]) -> Any:
    options = Options(values, "config.json")
    config = family_of(values["model_type"], "config.json").read(options)
    options.finish()
    return config


def test_the_released_text_01_is_the_published_shape() -> None:
    """Layers as numbers, factors by other names, half of the channels rotated."""
    assert told(config_of(RELEASED_TEXT_01)) == told(minimax_text_01())


def test_the_released_m2_rotates_half_of_the_channels() -> None:
    config = config_of(RELEASED_M2)
    assert config.mixers["attention"] == AttentionConfig(
        48, 128, 8, rope=0.5, rope_theta=5_000_000.0, qk_norm="channels"
    )
    with pytest.raises(UnsupportedError, match="rotary_dim"):
        config_of({**RELEASED_M2, "partial_rotary_factor": 0.25})


def test_layers_that_are_not_listed_are_not_guessed() -> None:
    """transformers alternates where nothing is said, which no release does."""
    without = {name: value for name, value in RELEASED_TEXT_01.items() if name != "attn_type_list"}
    with pytest.raises(CheckpointError, match="attn_type_list"):
        config_of(without)
    with pytest.raises(UnsupportedError, match="different layers"):
        config_of({**RELEASED_TEXT_01, "layer_types": ["full_attention"] * 80})
    with pytest.raises(UnsupportedError, match="'2'"):
        config_of({**RELEASED_TEXT_01, "attn_type_list": [0, 2] * 40})


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("layernorm_mlp_alpha", 2.0, "different factors"),
        ("layernorm_full_attention_beta", 0.5, "full_attn_beta_factor"),
        ("full_attn_alpha_factor", 2.0, "differ"),
        ("postnorm", False, "postnorm"),
        ("shared_intermediate_size", 64, "shared experts"),
        ("use_qk_norm", True, "minimax_m2"),
    ],
)
def test_what_is_not_built_is_named(option: str, value: Any, match: str) -> None:
    with pytest.raises((UnsupportedError, CheckpointError), match=match):
        config_of({**RELEASED_TEXT_01, option: value})


def test_half_of_the_channels_are_rotated_where_the_file_says_so(tmp_path: Path) -> None:
    """transformers ignores `rotary_dim`: with it these are other logits than its own."""
    folder = their_folder(CASE, tmp_path / "theirs")
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "rotary_dim": 4}), encoding="utf-8")
    model = intarsia.load(folder)
    assert model.config.mixers["attention"].rotated == 4  # type: ignore[attr-defined]
    with torch.no_grad():
        ours, theirs = model(tokens(30)).logits, their_model(CASE)(tokens(30)).logits
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()
    intarsia.save(model, tmp_path / "again", "minimax")
    assert intarsia.load(tmp_path / "again").config == model.config


def test_tables_of_decays_in_the_file_are_computed_anew(tmp_path: Path) -> None:
    """transformers saves its own with the weights, rounded in a bfloat16 model."""
    folder = their_folder(CASE, tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tables = {name for name in tensors if name.endswith(("slope_rate", "_decay"))}
    assert len(tables) == 8
    with torch.no_grad():
        expected = intarsia.load(folder)(tokens(9)).logits
        save_file({name: x for name, x in tensors.items() if name not in tables}, path)
        assert torch.equal(intarsia.load(folder)(tokens(9)).logits, expected)


RELEASED_M3: dict[str, Any] = {
    "model_type": "minimax_m3_text", "architectures": ["MiniMaxM3SparseForCausalLM"], "vocab_size": 200064,
    "hidden_size": 6144, "intermediate_size": 3072, "dense_intermediate_size": 12288, "hidden_act": "swigluoai",
    "shared_intermediate_size": 3072, "num_hidden_layers": 60, "num_attention_heads": 64, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 524288, "rms_norm_eps": 1e-6, "use_gemma_norm": True,
    "attention_output_gate": False, "rope_theta": 5000000, "rotary_dim": 64, "partial_rotary_factor": 0.5,
    "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "use_qk_norm": True, "qk_norm_type": "per_head",
    "num_local_experts": 128, "num_experts_per_tok": 4, "n_shared_experts": 1, "scoring_func": "sigmoid",
    "use_routing_bias": True, "routed_scaling_factor": 2.0, "num_mtp_modules": 1,
    "moe_layer_freq": [0] * 3 + [1] * 57, "tie_word_embeddings": False,
    "sparse_attention_config": {
        "use_sparse_attention": True, "sparse_index_dim": 128, "sparse_num_index_heads": 4, "sparse_topk_blocks": 16,
        "sparse_block_size": 128, "sparse_disable_index_value": [0] * 3 + [1] * 57, "sparse_score_type": "max",
        "sparse_init_block": 0, "sparse_local_block": 1, "sparse_attention_freq": [0] * 3 + [1] * 57,
    },
}  # fmt: skip


def test_the_released_m3_picks_16_blocks_of_128() -> None:
    options = Options(RELEASED_M3, "config.json")
    config = family_of("minimax_m3_text", "").read(options)
    options.finish()
    assert config.layers == ("attention",) * 3 + ("msa",) * 57
    attention: dict[str, Any] = {
        "num_heads": 64, "head_dim": 128, "num_kv_heads": 4, "rope": 0.5, "rope_theta": 5e6, "qk_norm": "head",
        "zero_centered_qk_norm": True,
    }  # fmt: skip
    assert config.mixers["attention"] == AttentionConfig(**attention)
    indexer = {"index_heads": 4, "index_dim": 128, "index_block_size": 128, "index_topk_blocks": 16}
    assert config.mixers["msa"] == MSAConfig(**attention, **indexer, index_local_blocks=1)
    assert config.feed_forward == FeedForwardConfig(12288, activation="clamped")
    assert config.experts == ExpertsConfig(
        128, 3072, 4, routed_scaling_factor=2.0, activation="clamped", d_shared=3072
    )
    assert (config.dense_layers, config.zero_centered_norms, config.norm_eps) == (3, True, 1e-6)


def test_m3_is_dense_if_asked() -> None:
    options = Options(RELEASED_M3, "config.json", sparse="dense")
    with pytest.warns(UserWarning, match="more than 2048 tokens"):
        config = family_of("minimax_m3_vl", "").read(options)
    options.finish()
    assert set(config.layers) == set(config.mixers) == {"attention"}


def test_m3_of_a_whole_checkpoint_reads_blocks_and_as_dense_all(tmp_path: Path) -> None:
    """Blocks of 4 tokens, 3 of them: dense it is the same up to 12 tokens, and not behind them."""
    case = next(case for case in CASES if case.family == "minimax_m3" and case.sparse == "dense")
    text = {**case.options["text_config"], "index_block_size": 4, "index_topk_blocks": 3}
    few = dataclasses.replace(case, options={**case.options, "text_config": text})
    folder, x = their_folder(few, tmp_path), tokens(40)
    with pytest.warns(UserWarning, match="more than 12 tokens"):
        dense = intarsia.load(folder, sparse="dense")
    with pytest.warns(UserWarning, match="left out: the vision tower"):
        sparse = intarsia.load(folder)
    with torch.no_grad():
        theirs = their_model(few)(x).logits
        errors = [
            (model(x).logits - theirs).abs().amax(dim=(0, 2)) / theirs.abs().max()
            for model in (dense, sparse)
        ]
    assert errors[0][:12].max() < 1e-4 < errors[0][12:].max()
    assert errors[1].max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"moe_layer_freq": [1, 0]}, "behind one with experts"),
        ({"use_gemma_norm": False}, "zero-centred"),
        ({"attention_output_gate": True}, "gate of attention's output"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "sparse_score_type"),
        (
            {
                "sparse_attention_config": {
                    "sparse_attention_freq": [0, 1],
                    "sparse_disable_index_value": [0, 0],
                }
            },
            "no values here",
        ),
    ],
)
def test_what_m3_does_not_have(changes: dict[str, Any], match: str) -> None:
    values = {**RELEASED_M3, "num_hidden_layers": 2, "moe_layer_freq": [0, 1], "sparse_attention_config": {}}
    with pytest.raises(UnsupportedError, match=match):
        family_of("minimax_m3_vl", "").read(Options({**values, **changes}, "config.json"))
