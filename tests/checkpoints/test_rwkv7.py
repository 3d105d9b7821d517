"""RWKV-7's files: what they leave to a formula, what they hold in older layouts, and what is not built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.mixers import ChannelMixingConfig, RWKV7Config
from intarsia.model import LanguageModel
from intarsia.model.language_model import cost_of
from support.checkpoint_cases import CASES, their_folder, tokens

CASE = next(case for case in CASES if case.family == "rwkv7")
WORLD: dict[str, Any] = {
    "model_type": "rwkv7", "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 24, "head_dim": 64,
    "num_heads": None, "decay_low_rank_dim": 96, "a_low_rank_dim": 96, "gate_low_rank_dim": 256,
    "v_low_rank_dim": 64, "hidden_ratio": 4.0, "intermediate_size": 8192, "hidden_act": "sqrelu", "norm_first": True,
    "norm_bias": True, "norm_eps": 1e-5, "attn": None, "attn_mode": "chunk", "fuse_norm": False,
    "fuse_cross_entropy": True, "tie_word_embeddings": False,
}  # fmt: skip


def config_of(**changes: Any) -> Any:
    options = Options({**WORLD, **changes}, "config.json")
    config = family("rwkv7").read(options)
    options.finish()
    return config


@pytest.mark.parametrize(
    ("d_model", "layers", "ranks", "parameters"),
    [
        (1024, 24, (64, 128, 32), 450_767_872),
        (2048, 24, (96, 256, 64), 1_527_404_544),
        (2560, 32, (96, 320, 64), 2_947_735_040),
    ],
)
def test_the_published_models_have_their_parameters(
    d_model: int, layers: int, ranks: tuple[int, int, int], parameters: int
) -> None:
    """Those that the paper counts, of 0.4 B, 1.5 B and 2.9 B."""
    config = config_of(
        hidden_size=d_model, num_hidden_layers=layers, intermediate_size=4 * d_model, decay_low_rank_dim=ranks[0],
        a_low_rank_dim=ranks[0], gate_low_rank_dim=ranks[1], v_low_rank_dim=ranks[2],
    )  # fmt: skip
    assert cost_of(config).parameters == parameters
    assert config.layers == ("time", "channels") * layers


def test_what_is_null_is_computed() -> None:
    names = (
        "decay_low_rank_dim",
        "a_low_rank_dim",
        "gate_low_rank_dim",
        "v_low_rank_dim",
        "intermediate_size",
    )
    config = config_of(**dict.fromkeys(names), hidden_ratio=3.9, head_dim=128)
    assert config.mixers["time"] == RWKV7Config(
        16, 128, 128, decay_rank=224, rate_rank=224, gate_rank=224, value_rank=160
    )
    assert config.mixers["channels"] == ChannelMixingConfig(8000)
    assert config_of(num_heads=16, head_dim=None).mixers["time"].head_dim == 128
    without = {name: value for name, value in WORLD.items() if name != "v_low_rank_dim"}
    with pytest.raises(CheckpointError, match="v_low_rank_dim"):
        family("rwkv7").read(Options(without, "config.json"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn": {"layers": [1], "num_heads": 8}}, "hybrid"),
        ({"norm_bias": False}, "without a bias"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"head_dim": 96}, "do not make up the width"),
        ({"value_dim": [2048] * 23 + [4096]}, "all layers must have the same"),
    ],
)
def test_what_is_not_built_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        config_of(**changes)


def test_values_may_be_wider_than_keys_and_norms_may_be_left_out() -> None:
    config = config_of(value_dim=4096, norm_first=False)
    assert config.mixers["time"].value_dim == 128
    assert not config.embed_norm
    names = {name for row in family("rwkv7").rows(config) for name in getattr(row, "theirs", ())}
    assert "model.layers.0.pre_norm.weight" not in names


def test_the_first_layer_has_no_mixture_of_values(tmp_path: Path) -> None:
    """The authors' files hold one that nobody reads; here it would be a tensor of no use."""
    path = their_folder(CASE, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    assert "model.layers.1.attn.v_lora.lora.0.weight" in tensors
    save_file({**tensors, "model.layers.0.attn.v_lora.lora.0.weight": torch.zeros(4, 30)}, path)
    with pytest.raises(CheckpointError, match=r"0\.attn\.v_lora.*belongs to nothing"):
        intarsia.load(tmp_path)


def test_a_shift_of_older_shape_is_read(tmp_path: Path) -> None:
    path = their_folder(CASE, tmp_path) / "model.safetensors"
    with torch.no_grad():
        expected = intarsia.load(tmp_path)(tokens(9)).logits
        tensors = {name: x[None, None] if "ffn.x_k" in name else x for name, x in load_file(path).items()}
        save_file(tensors, path)
        assert torch.equal(intarsia.load(tmp_path)(tokens(9)).logits, expected)


def test_only_layers_in_turn_are_written(tmp_path: Path) -> None:
    model = intarsia.load(their_folder(CASE, tmp_path / "theirs"))
    other = LanguageModel(model.config.replace(layout="time channels channels time channels time"))
    other.init_weights(0)
    with pytest.raises(UnsupportedError, match="in turn"):
        intarsia.save(other, tmp_path / "ours", "rwkv7")
    with pytest.raises(UnsupportedError, match="lfm2"):
        intarsia.save(model, tmp_path / "ours", "lfm2")
