"""Models of state spaces: what releases say otherwise than transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia
from intarsia.checkpoints.family import told, written
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.model.language_model import cost_of
from support.checkpoint_cases import CASES, Case, their_folder, their_model, tokens

pytest.importorskip("transformers")

ORIGINAL: dict[str, Any] = {
    "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def config_of(name: str, values: dict[str, Any]) -> Any:
    options = Options(values, "config.json")
    config = family(name).read(options)
    options.finish()
    return config


def case_of(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


def test_the_first_mamba2_has_its_parameters() -> None:
    """Of 130 M; the vocabulary is padded, and nothing names the kind of the model."""
    assert cost_of(config_of("mamba2", ORIGINAL)).parameters == 128_989_632


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ssm_cfg": {}}, "Mamba-1"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "before the gate"),
        ({"attn_layer_idx": [9, 18]}, "attention in this family"),
        ({"d_intermediate": 1024}, "feed-forwards"),
        ({"ssm_cfg": {"layer": "Mamba2", "something": 3}}, "something"),
    ],
)
def test_what_the_first_code_can_say_and_is_not_built_is_named(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedError, match=part):
        config_of("mamba2", {**ORIGINAL, **change})


def test_the_layout_of_the_first_code(tmp_path: Path) -> None:
    """One name differs, a tied head is there once more, and `config.json` has words of its own."""
    case = case_of("mamba2-")
    folder = their_folder(case, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, folder / "model.safetensors")
    values = {
        **ORIGINAL, "d_model": 28, "n_layer": 3, "vocab_size": 60, "pad_vocab_size_multiple": 61,
        "tie_embeddings": False,
        "ssm_cfg": {"layer": "Mamba2", "expand": 3, "headdim": 14, "ngroups": 3, "d_state": 10},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    model = intarsia.load(folder)
    with torch.no_grad():
        expected = their_model(case)(tokens(40)).logits
        torch.testing.assert_close(
            model(tokens(40)).logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item()
        )


def test_heads_that_do_not_make_up_the_width_inside_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expand = 2"):
        config_of("mamba2", {"hidden_size": 64, "num_heads": 8, "head_dim": 12})


NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4480, "intermediate_size": 15680,
    "hybrid_override_pattern": "M-M-M-MM-M*-M-M*-MMM-M*MM-M-", "num_hidden_layers": 28,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False, "mlp_bias": False,
    "mlp_hidden_act": "relu2", "mamba_num_heads": 128, "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "expand": 2, "mamba_hidden_act": "silu", "mamba_proj_bias": False, "use_bias": False,
    "use_conv_bias": True, "chunk_size": 128, "layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5,
    "residual_in_fp32": False, "rescale_prenorm_residual": True, "time_step_min": 0.001, "time_step_max": 0.1,
    "time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")], "use_mamba_kernels": True,
    "num_logits_to_keep": 1, "sliding_window": None, "tie_word_embeddings": False, "hidden_dropout": 0.0,
}  # fmt: skip


def test_layers_of_one_thing_each_become_blocks() -> None:
    """A feed-forward belongs to the mixer before it; where two mixers follow each other the first has none."""
    config = config_of("nemotron_h", NEMOTRON)
    pattern = NEMOTRON["hybrid_override_pattern"]
    assert config.depth == pattern.count("M") + pattern.count("*")
    assert config.layers[:5] == ("mamba2", "mamba2", "mamba2", "mamba2_alone", "mamba2")
    with_feed_forward = [config.has_feed_forward(layer) for layer in range(config.depth)]
    assert sum(with_feed_forward) == pattern.count("-")
    assert config.mixers["attention"].rope == 0, "there are no positions"
    assert told(config) == told(config_of("nemotron_h", written(family("nemotron_h"), config)))


def test_a_feed_forward_behind_another_is_a_block_of_its_own() -> None:
    changed = {**NEMOTRON, "hybrid_override_pattern": "-M--*", "num_hidden_layers": 5}
    config = config_of("nemotron_h", changed)
    assert config.layers == ("mlp", "mamba2", "mlp", "attention_alone")
    assert config.mixer_only == ("mlp", "attention_alone")
    again = written(family("nemotron_h"), config)
    assert again["hybrid_override_pattern"] == "-M--*"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hybrid_override_pattern": "EM", "num_hidden_layers": 2}, "no mixer stands before"),
        ({"hybrid_override_pattern": "MEM-", "num_hidden_layers": 4}, "behind one with experts"),
        ({"hybrid_override_pattern": "MX", "num_hidden_layers": 2}, "layer 1 is 'X'"),
        ({"num_hidden_layers": 27}, "28 layers are listed"),
        ({"layers_block_type": ["mamba"] * 28}, "differ"),
        ({"mlp_hidden_act": "silu"}, "activation"),
        ({"sliding_window": 4096}, "window"),
    ],
)
def test_what_nemotron_can_say_and_is_not_built_is_named(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedError, match=part):
        config_of("nemotron_h", {**NEMOTRON, **change})


GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512,
    "shared_intermediate_size": 1024, "num_hidden_layers": 6, "layer_types": ["mamba"] * 5 + ["attention"],
    "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6,
    "mamba_n_heads": 48, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "embedding_multiplier": 12, "logits_scaling": 6, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
    "attention_bias": False, "position_embedding_type": "nope", "normalization_function": "rmsnorm",
    "init_method": "mup", "rope_theta": 10000, "rope_scaling": None, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "output_router_logits": False, "router_aux_loss_coef": 0.01,
}  # fmt: skip


def test_granite_says_its_layers_in_older_words() -> None:
    """Heads whose size is left to a division, and whole numbers for factors."""
    config = config_of("granitemoehybrid", GRANITE)
    assert config.layers == ("mamba2",) * 5 + ("attention",)
    mamba, attention = config.mixers["mamba2"], config.mixers["attention"]
    assert (mamba.head_dim, attention.head_dim, attention.rope) == (64, 128, 0.0)
    assert (config.embed_scale, config.head_scale, attention.scale) == (12.0, 1 / 6, 0.0078125)
    assert told(config) == told(config_of("granitemoehybrid", written(family("granitemoehybrid"), config)))


@pytest.mark.parametrize("divisor", [3.0, 49.0, 0.1, 103.0, 16.0])
def test_a_divisor_of_logits_is_read_as_it_was_written(divisor: float) -> None:
    config = config_of("granitemoehybrid", {**GRANITE, "logits_scaling": divisor})
    values = written(family("granitemoehybrid"), config)
    assert 1 / values["logits_scaling"] == config.head_scale


def test_heads_of_granite_that_do_not_make_up_the_width_are_refused() -> None:
    with pytest.raises(CheckpointError, match="mamba_expand"):
        config_of("granitemoehybrid", {**GRANITE, "mamba_d_head": 32})
    with pytest.raises(UnsupportedError, match="positions of that kind"):
        config_of("granitemoehybrid", {**GRANITE, "position_embedding_type": "alibi"})


FALCON: dict[str, Any] = {
    "model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "mamba_norm_before_gate": False, "mamba_rms_norm": False, "projectors_bias": False, "attention_bias": False,
    "mlp_bias": False, "rope_theta": 100000000000.0, "rope_scaling": None, "key_multiplier": 0.39, "hidden_act": "silu",
    "embedding_multiplier": 5.656854249492381, "lm_head_multiplier": 0.0390625, "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.9375, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551584,
    "ssm_multipliers": [0.3535, 0.25, 0.3535, 0.5, 0.3535], "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attn_layer_indices": None, "num_logits_to_keep": 1,
}  # fmt: skip


def test_factors_of_falcon_are_all_there_and_are_read_as_they_were_written() -> None:
    config = config_of("falcon_h1", FALCON)
    parallel = config.mixers["parallel"]
    assert parallel.mamba2.input_scales == tuple(1.25 * x for x in FALCON["ssm_multipliers"])
    assert parallel.attention.scale == pytest.approx(0.39 / 8)
    assert (config.feed_forward.gate_scale, config.feed_forward.scale) == tuple(FALCON["mlp_multipliers"])
    assert parallel.mamba2.norm == "none"
    assert told(config) == told(config_of("falcon_h1", written(family("falcon_h1"), config)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mamba_proj_bias": True}, "differ"),
        ({"mamba_proj_bias": True, "projectors_bias": True}, "ssm_in_multiplier"),
        ({"mlp_bias": True}, "biases"),
        ({"ssm_multipliers": [1.0]}, "5 numbers"),
        ({"mamba_d_head": 32}, "mamba_d_ssm"),
    ],
)
def test_what_falcon_can_say_and_is_not_built_is_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises((UnsupportedError, CheckpointError), match=problem):
        config_of("falcon_h1", {**FALCON, **change})
