"""Attention that chooses what it reads, loaded as if it chose everything; and DeepSeek's stretched rotations."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.errors import ConfigError, UnsupportedError
from intarsia.layers.rope import Yarn
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.model import HyperConnectionsConfig
from support.checkpoint_cases import CASES, Case, their_folder, their_model, tokens

pytest.importorskip("transformers")

INDEXED = [case for case in CASES if case.sparse == "dense"]
FLAT = [case for case in INDEXED if "index_topk" in case.options]
RELEASED_V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def config_of(name: str, values: dict[str, Any]) -> Any:
    options = Options(values, "config.json", sparse="dense")
    with pytest.warns(UserWarning, match="not the published model"):
        config = family(name).read(options)
    options.finish()
    return config


def read(values: dict[str, Any], name: str = "glm5_next") -> Any:
    options = Options(values, "config.json")
    config = family(name).read(options)
    options.finish()
    return config


def test_the_released_v32_is_stretched_and_its_logits_are_larger() -> None:
    config = config_of("deepseek_v32", RELEASED_V32)
    yarn = Yarn(40.0, 4096, attention_factor=1.0)
    assert config.mixers["mla"] == MLAConfig(
        128, 512, 128, 64, 128, q_rank=1536, rotate=True, yarn=yarn, yarn_logits=1.0
    )
    assert config.mixers["mla"].scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert (config.experts.num_groups, config.experts.num_active_groups, config.dense_layers) == (8, 4, 3)
    written = family("deepseek_v3").write(config)  # type: ignore[misc]
    assert written["rope_parameters"]["mscale"] == written["rope_parameters"]["mscale_all_dim"] == 1.0


def test_what_is_left_out_of_glm5s_file_is_transformers_default() -> None:
    config = config_of("glm_moe_dsa", {
        "vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64,
        "rope_parameters": {"rope_theta": 1000000}, "indexer_rope_interleave": True,
    })  # fmt: skip
    assert config.mixers["mla"] == MLAConfig(
        64, 512, 192, 64, 256, q_rank=2048, rotate=True, rope_theta=1_000_000.0
    )
    assert (config.experts.num_groups, config.feed_forward.d_hidden, config.norm_eps) == (1, 12288, 1e-5)


def test_glm53_says_its_linear_layers_in_two_ways_and_a_head_dim_that_means_nothing() -> None:
    linear = {"head_dim": 96, "num_heads": 32, "short_conv_kernel_size": 3, "safe_gate": True}
    values = {"vocab_size": 154880, "head_dim": 0, "index_kpool": 4, "index_topk": 2048, "swiglu_limit": 7.0}
    config = config_of("glm5_next", {**values, "linear_attn_config": linear})
    assert config.layers == tuple((["kda"] * 3 + ["mla"]) * 11 + ["kda"])
    assert config.mixers["kda"] == KDAConfig(32, 96, conv_size=3, gate="bounded")
    latent = {"q_rank": 1536, "latent_norm_eps": 1e-5}
    assert config.mixers["mla"] == MLAConfig(64, 512, 256, 0, 256, **latent)
    assert (config.experts.limit, config.feed_forward.limit, config.dense_layers) == (7.0, 7.0, 3)
    assert config.hyper_connections == HyperConnectionsConfig(4, 20, 1e-6)
    for bound, expected in ((None, "softplus"), (-2.0, "bounded")):
        mixer = config_of("glm5_next", {**values, "linear_lower_bound": bound}).mixers["kda"]
        assert mixer.gate == expected
        assert bound is None or mixer.gate_lower_bound == bound
    with pytest.raises(UnsupportedError, match="qk_rope_head_dim"):
        config_of("glm5_next", {**values, "qk_rope_head_dim": 64})
    sparse = read(values).mixers["dsa"]
    assert sparse == DSAConfig(64, 512, 256, 0, 256, **latent, top_k=2048, index_heads=32, index_pool=4)
    untailed = Options({**values, "index_kpool_always_select_tail": False}, "config.json", sparse="dense")
    with pytest.raises(UnsupportedError, match="index_kpool_always_select_tail"):
        family("glm5_next").read(untailed)


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_it_is_the_published_model_up_to_the_tokens_that_are_chosen(case: Case, tmp_path: Path) -> None:
    """And no longer behind them, as the warning says."""
    few = dataclasses.replace(case, options={**case.options, "index_topk": 12, "index_n_heads": 16})
    folder = their_folder(few, tmp_path)
    with pytest.warns(UserWarning, match="indexer") as told:
        model = intarsia.load(folder, sparse="dense")
    messages = [str(warning.message) for warning in told]
    assert any("more than 12 tokens" in message for message in messages)
    assert any("left out: the indexers of sparse attention" in message for message in messages)
    x = tokens(40)
    with torch.no_grad():
        ours, theirs = model(x).logits, their_model(few)(x).logits
    error = (ours - theirs).abs().amax(dim=(0, 2)) / theirs.abs().max()
    assert error[:12].max() < 1e-4 < error[12:].max()


def test_it_is_not_dense_unless_that_is_asked_for(tmp_path: Path) -> None:
    case = next(case for case in INDEXED if case.family == "glm5_next")
    model = intarsia.load(their_folder(case, tmp_path / "pooled"))
    assert model.config.layers == ("kda", "dsa", "kda", "dsa")
    folder = their_folder(FLAT[0], tmp_path / "flat")
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "layer_types": ["full_attention"] * 3}), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="layer_types"):
        intarsia.load(folder, sparse="dense")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rotate": False, "yarn": Yarn(2.0, 64)}, "rotate is off"),
        ({"yarn_logits": 1.0}, "goes with yarn"),
        ({"yarn": Yarn(2.0, 64), "yarn_logits": -1.0}, "at least 0"),
    ],
)
def test_stretched_latent_attention_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MLAConfig(
            **{
                "num_heads": 2,
                "kv_rank": 8,
                "nope_dim": 4,
                "rope_dim": 4,
                "v_dim": 6,
                "rotate": True,
                **changes,
            }
        )


def test_the_released_v32_picks_2048_tokens() -> None:
    options = Options(RELEASED_V32, "config.json")
    config = family("deepseek_v32").read(options)
    options.finish()
    (mixer,) = config.mixers.values()
    assert isinstance(mixer, DSAConfig)
    assert (mixer.top_k, mixer.index_heads, mixer.index_dim, mixer.shares) == (2048, 64, 128, False)
    assert (mixer.num_heads, mixer.q_rank, mixer.yarn_logits) == (128, 1536, 1.0)


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        ({}, "FFFFFFFF"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFS"),
        ({"index_topk_freq": 2}, "FFSFSFSF"),
        ({"index_topk_pattern": "FSSSFSSS", "index_topk_freq": 2}, "FSSSFSSS"),
        ({"indexer_types": ["full"] * 2 + ["shared"] * 6, "index_topk_pattern": "FSSSFSSS"}, "FFSSSSSS"),
    ],
)
def test_which_layers_share_is_said_in_three_ways(said: dict[str, Any], letters: str) -> None:
    values = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, **said}
    options = Options(values, "config.json")
    config = family("glm_moe_dsa").read(options)
    options.finish()
    assert "".join({"dsa": "F", "shared": "S"}[name] for name in config.layers) == letters
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GlmMoeDsaConfig(**values).indexer_types
    assert "".join(kind[0].upper() for kind in theirs) == letters
    assert all(config.mixers[name].shares == (name == "shared") for name in config.layers)


@pytest.mark.parametrize("kinds", [["shared"] * 2, ["full"], ["full", "half"]])
def test_layers_that_cannot_share(kinds: list[str]) -> None:
    values = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UnsupportedError, match="the first has an indexer"):
        family("glm_moe_dsa").read(Options({**values, "indexer_types": kinds}, "config.json"))


def test_glm53s_layers_share_what_the_last_one_that_chooses_has_picked() -> None:
    kinds = ["linear_attention", "indexed_attention", "full_attention", "indexed_attention"]
    values = {"vocab_size": 50, "num_hidden_layers": 4, "layer_types": kinds, "index_kpool": 4}
    config = read({**values, "indexer_types": ["shared", "full", "shared", "full"]})
    assert config.layers == ("kda", "dsa", "shared", "dsa")
    assert config.mixers["shared"] == dataclasses.replace(config.mixers["dsa"], shares=True)
    with pytest.raises(UnsupportedError, match="layer 1, the first that chooses"):
        read({**values, "indexer_types": ["full", "shared", "full", "full"]})
    with pytest.raises(UnsupportedError, match="layer_types has"):
        read({**values, "layer_types": ["sliding_attention", *kinds[1:]]})


QWEN_NEXT: dict[str, Any] = {
    "architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp_text", "vocab_size": 248320,
    "hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 24, "num_key_value_heads": 2, "head_dim": 256,
    "attn_output_gate": True, "hidden_act": "silu", "full_attention_interval": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 48, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640, "num_experts": 512,
    "num_experts_per_tok": 10, "hc_count": 4, "hc_lowrank": 320, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4, "rms_norm_eps": 1e-6,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12, "seed": 1234, "ngram_size": 3,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10], "mrope_interleaved": True,
    },
}  # fmt: skip


def test_qwens_next_is_read_but_for_its_embedding_of_ngrams() -> None:
    config = read(QWEN_NEXT, "qwen4_exp")
    assert config.layers == ("gdn", "gdn", "gdn", "qsa") * 12
    assert config.mixers["qsa"] == QSAConfig(
        24, 256, 2, rope=0.25, rope_theta=1e7, qk_norm="head", zero_centered_qk_norm=True, output_gate=True,
        index_heads=4, index_dim=128, index_budget=2048, index_ratio=4,
    )  # fmt: skip
    assert config.hyper_connections == HyperConnectionsConfig(4, rank=320)
    with pytest.raises(UnsupportedError, match=r"ple_layer_ids is \[2\].*n-grams"):
        read({**QWEN_NEXT, "ple_layer_ids": [2]}, "qwen4_exp")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"indexer_kv_heads": 2}, "several key heads"),
        ({"output_gate_type": "gelu"}, "output_gate_type"),
        ({"layer_types": ["linear_attention"]}, "has 1 layers"),
        ({"norm_topk_prob": False}, "not divided by their sum"),
    ],
)
def test_what_of_qwens_next_is_not_built_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        read({**QWEN_NEXT, **changes}, "qwen4_exp")
