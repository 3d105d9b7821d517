"""Models of the presets as others read them: what is trained here is written for transformers, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia
from intarsia.errors import UnsupportedError
from intarsia.model import LanguageModel, presets
from support.checkpoint_cases import VOCABULARY, tokens

pytest.importorskip("transformers")


def made(preset: str) -> LanguageModel:
    model = LanguageModel(presets.get(preset, vocab_size=VOCABULARY, init_std=0.15)).eval()
    model.init_weights(0)
    return model


@pytest.mark.parametrize(
    ("preset", "family", "theirs"),
    [
        ("kimi-linear-nano", "kimi_linear", "KimiLinearForCausalLM"),
        ("qwen3-next-nano", "qwen3_next", "Qwen3NextForCausalLM"),
        ("qwen3-next-nano", None, "Qwen3_5ForCausalLM"),
        ("olmo-hybrid-nano", None, "OlmoHybridForCausalLM"),
        ("full-nano", None, "DeepseekV3ForCausalLM"),
        ("deepseek-v3.2-nano", None, "DeepseekV32ForCausalLM"),
        ("glm-5.3-flash-nano", None, "Glm5NextForConditionalGeneration"),
    ],
)
def test_a_preset_is_read_by_transformers(
    preset: str, family: str | None, theirs: str, tmp_path: Path
) -> None:
    import transformers

    model, x = made(preset), tokens(300)  # more than sparse layers read
    intarsia.save(model, tmp_path, family)
    reader: Any = getattr(transformers, theirs)
    there = reader.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = model(x).logits, there(x).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    read = intarsia.load(tmp_path).config
    assert read.layers == model.config.layers
    assert read.experts is None


def test_a_hybrid_of_blocks_and_fixed_decays_is_read_again(tmp_path: Path) -> None:
    model, x = made("minicpm-sala-nano"), tokens(300)
    intarsia.save(model, tmp_path)
    again = intarsia.load(tmp_path)
    assert again.config.embed_scale == again.config.branch_scale == again.config.head_scale == 1
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_the_reports_hybrid_has_a_layer_that_qwens_have_not(family: str, tmp_path: Path) -> None:
    """Latent attention with positions; `qwen3-next-*` has Gated DeltaNet beside grouped attention."""
    with pytest.raises(UnsupportedError, match="layer 3 is 'mla', and the family has gdn, attention"):
        intarsia.save(made("gdn-hybrid-nano"), tmp_path / "out", family)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match="holds all of them"):
        intarsia.save(made("gdn-hybrid-nano"), tmp_path / "out")
