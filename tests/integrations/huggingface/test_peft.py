"""Adapters of PEFT on our linear maps: trained, cached, merged and saved."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.15")
pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model

from intarsia.checkpoints.native import load_model
from intarsia.integrations.huggingface import IntarsiaForCausalLM
from support.arithmetic import ALL, END, SUMS, model, tokenizer


def adapted(seat):
    """With adapters on every linear map that do something."""
    torch.manual_seed(1)
    made = get_peft_model(seat, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_adapters_hold_with_a_cache_and_without():
    """Also where a layer reads a weight itself, as latent attention does behind a cache."""
    seat = adapted(model(ALL, seed=3))
    names = {name for name, _ in seat.named_parameters() if "lora_A" in name}
    assert any("kv_up_proj" in name for name in names)
    assert not any("head" in name for name in names)
    ids = tokenizer()([q for q, _ in SUMS[:3]], return_tensors="pt").input_ids
    with torch.no_grad():
        whole = seat(ids, use_cache=False).logits
        first = seat(ids[:, :2], use_cache=True)
        pieces = [first.logits]
        for place in (2, 3):
            pieces.append(seat(ids[:, place : place + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    with seat.disable_adapter(), torch.no_grad():
        assert (seat(ids, use_cache=False).logits - whole).abs().max() > 0.01


def test_adapters_are_trained_merged_and_saved(tmp_path):
    seat = model(ALL, seed=3)
    frozen = {name: parameter.clone() for name, parameter in seat.model.named_parameters()}
    made = get_peft_model(seat, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    texts = tokenizer()([q + a + END for q, a in SUMS], return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = made(texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in seat.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])
    made.eval()
    with torch.no_grad():
        expected = made(texts).logits
        made.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(model(ALL, seed=3), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(texts).logits, expected)
        merged = made.merge_and_unload()
        assert type(merged) is IntarsiaForCausalLM
        merged.save_pretrained(tmp_path / "merged")
        loaded = load_model(tmp_path / "merged").eval()
        torch.testing.assert_close(loaded(texts).logits, expected, rtol=1e-4, atol=1e-4)
