"""What the files of Ling say in two ways, and what they leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia
from intarsia.checkpoints.opening import load_config
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.errors import UnsupportedError
from intarsia.layers.rope import Yarn
from intarsia.mixers import KDAConfig, LightningConfig, MLAConfig
from support.checkpoint_cases import CASES, their_folder, tokens

pytest.importorskip("transformers")

CASE = next(case for case in CASES if case.family == "bailing_hybrid")
LING: dict[str, Any] = {
    "model_type": "bailing_hybrid", "vocab_size": 157184, "hidden_size": 2560, "num_hidden_layers": 42,
    "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "model_max_length": 262144,
}  # fmt: skip


def config_of(**changes: Any) -> Any:
    options = Options({**LING, **changes}, "config.json")
    config = family("bailing_hybrid").read(options)
    options.finish()
    return config


def test_what_is_left_out_is_the_flash_model() -> None:
    config = config_of()
    assert config.layers == ("kda", "kda", "kda", "kda", "kda", "mla") * 7
    assert config.mixers["kda"] == KDAConfig(
        32, 128, gate="bounded", gate_lower_bound=-5.0, decay_rank=None, output_gate_rank=None
    )
    assert config.mixers["mla"] == MLAConfig(
        32, 512, 128, 64, 128, rotate=True, rope_theta=6_000_000.0, head_gate=True
    )
    of = config.experts
    assert (of.num_experts, of.num_groups, of.num_active_groups, config.dense_layers) == (512, 8, 4, 2)


def test_the_channels_of_a_linear_head_are_not_those_that_transformers_calls_head_dim(tmp_path: Path) -> None:
    """It writes the rotated channels of latent attention there."""
    folder = their_folder(CASE, tmp_path)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (values["head_dim"], values["linear_head_dim"]) == (6, 8)
    assert load_config(folder).mixers["kda"].head_dim == 8  # type: ignore[attr-defined]
    assert config_of(head_dim=96).mixers["kda"].head_dim == 96


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_norm_size": 4, "num_attention_heads": 24, "num_key_value_heads": 24}, "power of 2"),
        ({"group_norm_size": 4, "linear_rope": False}, "without positions"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "all of its shared channels"),
        ({"score_function": "softmax"}, "score_function"),
        ({"use_qkv_bias": True}, "use_qkv_bias"),
    ],
)
def test_what_is_not_built_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        config_of(**options)


def test_the_output_of_a_layer_has_either_name(tmp_path: Path) -> None:
    """`dense` in what transformers saves; `o_proj` where a layer was not renamed."""
    folder = their_folder(CASE, tmp_path)
    path = folder / "model.safetensors"
    with torch.no_grad():
        expected = intarsia.load(folder)(tokens(9)).logits
        tensors = {
            name.replace("1.attention.dense", "1.attention.o_proj"): x for name, x in load_file(path).items()
        }
        assert "model.layers.1.attention.o_proj.weight" in tensors
        save_file(tensors, path)
        assert torch.equal(intarsia.load(folder)(tokens(9)).logits, expected)


RING_25: dict[str, Any] = {  # the names of the released class, sizes as the model of 1 T parameters may have them
    "model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"], "vocab_size": 157184,
    "hidden_size": 8192, "intermediate_size": 18432, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 64, "hidden_act": "silu", "use_qkv_bias": False, "use_bias": False, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "embedding_dropout": 0.0, "attention_dropout": 0.0, "output_dropout": 0.0,
    "max_position_embeddings": 131072, "rope_theta": 6000000, "max_window_layers": 20, "rope_scaling": None,
    "num_experts": 256, "num_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 4, "head_dim": 128, "use_qk_norm": True,
    "num_nextn_predict_layers": 1, "mtp_loss_scaling_factor": 0, "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5, "layer_group_size": 8, "group_norm_size": 8, "linear_silu": False,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "qk_head_dim": 192, "rope_interleave": True, "partial_rotary_factor": 0.5, "score_function": "sigmoid",
    "scoring_func": "sigmoid", "seq_aux": True, "topk_method": "noaux_tc", "router_dtype": "fp32",
}  # fmt: skip


def test_ring_25_has_lightning_attention_and_latent_attention_that_rotates_all_shared_channels() -> None:
    options = Options(RING_25, "config.json")
    config = family("bailing_hybrid").read(options)
    options.finish()
    assert config.layers == ("lightning",) * 7 + ("mla",) + (("lightning",) * 7 + ("mla",)) * 9
    lightning = config.mixers["lightning"]
    assert lightning == LightningConfig(
        64,
        128,
        decay_from=1,
        silu=False,
        qk_norm=True,
        rope=0.5,
        rope_theta=6e6,
        scale=128**-0.5,
        norm_groups=8,
    )
    assert lightning.at_layer(1, 80).decay_factor == pytest.approx(1, abs=2e-5)  # type: ignore[attr-defined]
    assert lightning.at_layer(0, 80).decay_factor == pytest.approx(1 + 1 / 79, abs=2e-5)  # type: ignore[attr-defined]
    assert config.mixers["mla"] == MLAConfig(64, 512, 128, 64, 128, q_rank=1536, rotate=True, rope_theta=6e6)
    assert (config.experts.num_experts, config.dense_layers) == (256, 4)


def test_what_files_of_ring_25_hold_of_decays_is_computed(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.variant == "lightning")
    folder = their_folder(case, tmp_path)
    path = folder / "model.safetensors"
    with torch.no_grad():
        expected = intarsia.load(folder)(tokens(9)).logits
        save_file({**load_file(path), "model.layers.0.attention.slope": torch.ones(4)}, path)
        assert torch.equal(intarsia.load(folder)(tokens(9)).logits, expected)


def test_ring_25_longer_than_it_was_trained() -> None:
    """YaRN turns linear layers and latent attention alike."""
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 131072}
    options = Options({**RING_25, "rope_scaling": scaling}, "config.json")
    config = family("bailing_hybrid").read(options)
    options.finish()
    assert config.mixers["lightning"].yarn == config.mixers["mla"].yarn == Yarn(2.0, 131072)  # type: ignore[attr-defined]
