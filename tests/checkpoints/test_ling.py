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
from intarsia.mixers import KDAConfig, MLAConfig
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
        ({"group_norm_size": 4, "linear_silu": True}, "Lightning Attention of Ling and Ring 2.5"),
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
