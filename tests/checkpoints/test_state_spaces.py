"""Models of state spaces: what releases say otherwise than transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia
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
