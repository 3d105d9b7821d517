"""Kimi K3's text model, as far as it is published: options, names, padded decays, experts of four bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import intarsia
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family_of
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, cost_of
from support.checkpoint_cases import CASES, Case, their_folder, tokens

pytest.importorskip("transformers")

CASE = next(case for case in CASES if case.variant == "k3")
DEPTH = 93
FULL = [*range(4, DEPTH, 4), DEPTH]
K3: dict[str, Any] = {
    "model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 7168, "num_hidden_layers": DEPTH,
    "num_attention_heads": 96, "num_key_value_heads": 96, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True,
    "mla_use_output_gate": True, "intermediate_size": 33792, "moe_intermediate_size": 3072, "num_experts": 896,
    "num_experts_per_token": 16, "num_shared_experts": 2, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
    "routed_expert_hidden_size": 3584, "latent_moe_use_norm": True, "hidden_act": "situ", "rms_norm_eps": 1e-5,
    "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0, "attn_res_block_size": 12,
    "topk_method": "noaux_tc", "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1,
    "linear_attn_config": {
        "kda_layers": [n for n in range(1, DEPTH + 1) if n not in FULL], "full_attn_layers": FULL, "num_heads": 96,
        "head_dim": 128, "short_conv_kernel_size": 4, "use_full_rank_gate": True, "gate_lower_bound": -5.0,
    },
    "quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": []},
}  # fmt: skip


def config_of(**changes: Any) -> Any:
    options = Options({**K3, **changes}, "config.json")
    config = family_of("kimi_k3", "").read(options)
    options.finish()
    return config


def test_the_model_is_that_which_is_described() -> None:
    config = config_of()
    assert config.layers[-4:] == ("kda", "kda", "mla", "mla")
    assert config.layers.count("kda") == 69
    assert config.mixers["kda"] == KDAConfig(96, 128, gate="bounded", output_gate_rank=None, norm_eps=1e-5)
    assert config.mixers["mla"] == MLAConfig(
        96, 512, 128, 64, 128, q_rank=1536, latent_norm_eps=1e-5, output_gate=True
    )
    assert config.feed_forward == FeedForwardConfig(33792, 4.0, "situ", up_limit=25.0)
    assert config.experts == ExpertsConfig(
        896, 3072, 16, 2, activation="situ", limit=4.0, up_limit=25.0, d_latent=3584, latent_norm=True
    )
    assert (config.attention_residuals, config.dense_layers) == (12, 1)
    assert cost_of(config).parameters == pytest.approx(2.8e12, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"topk_method": "greedy"}, "choice of experts"),
        ({"quantization_config": {**K3["quantization_config"], "format": "nvfp4-pack-quantized"}}, "format"),
    ],
)
def test_what_is_not_built_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        config_of(**changes)


def changed(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)


def test_decays_are_padded(tmp_path: Path) -> None:
    """To 128, of which those of heads that are there come first; anything else is too long."""
    folder = their_folder(CASE, tmp_path)
    x = tokens(9)

    def padded(to: int) -> Any:
        return lambda tensors: {
            name: torch.cat([t[:3], torch.full((to - 3,), 9.0)]) if name.endswith("A_log") else t
            for name, t in tensors.items()
        }

    with torch.no_grad():
        expected = intarsia.load(folder)(x).logits
        changed(folder, padded(128))
        assert torch.equal(intarsia.load(folder)(x).logits, expected)
    changed(folder, padded(100))
    with pytest.raises(CheckpointError, match="A_log"):
        intarsia.load(folder)


def test_layers_may_stand_at_once_under_the_language_model(tmp_path: Path) -> None:
    folder = their_folder(CASE, tmp_path)
    with torch.no_grad():
        expected = intarsia.load(folder)(tokens(9)).logits
        changed(folder, lambda tensors: {
            f"language_model.{name.replace('model.layers.', 'layers.')}": t for name, t in tensors.items()
        })  # fmt: skip
        assert torch.equal(intarsia.load(folder)(tokens(9)).logits, expected)


def of_four_bits(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed numbers `[rows, columns / 2]`, scales `[rows, columns / 32]`, and what they are, number by number."""
    packed = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    numbers = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            code = (int(packed[r, c // 2]) >> 4 * (c % 2)) & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            numbers[r, c] = (-size if code & 8 else size) * 2.0 ** (int(scales[r, c // 32]) - 127)
    return packed, scales, numbers


def test_experts_of_four_bits_become_floats(tmp_path: Path) -> None:
    options = {
        **CASE.options,
        "moe_intermediate_size": 32,
        "routed_expert_hidden_size": 64,
        "num_hidden_layers": 2,
    }
    linear = {**options["linear_attn_config"], "kda_layers": [1], "full_attn_layers": [2]}
    case = dataclasses.replace(CASE, options={**options, "linear_attn_config": linear, "num_experts": 4})
    assert isinstance(case, Case)
    there, packed_there = their_folder(case, tmp_path / "floats"), their_folder(case, tmp_path / "packed")
    generator = torch.Generator().manual_seed(0)
    floats, packed = {}, {}
    for name, tensor in load_file(there / "model.safetensors").items():
        if ".experts." not in name:
            floats[name] = packed[name] = tensor
            continue
        packed[f"{name}_packed"], packed[f"{name}_scale"], floats[name] = of_four_bits(
            generator, *tensor.shape
        )
    save_file(floats, there / "model.safetensors")
    save_file(packed, packed_there / "model.safetensors")
    path = packed_there / "config.json"
    values = {**json.loads(path.read_text()), "quantization_config": K3["quantization_config"]}
    path.write_text(json.dumps(values))
    with torch.no_grad():
        expected = intarsia.load(there)(tokens(9)).logits
        assert torch.equal(intarsia.load(packed_there)(tokens(9)).logits, expected)
    for name in [name for name in packed if name.endswith("1.w2.weight_scale")]:
        del packed[name]
    save_file(packed, packed_there / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1\.w2\.weight_scale is missing"):
        intarsia.load(packed_there)
