"""Layers that mix their values with those of the first: RWKV-7, whose two halves are blocks of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.mixers import AttentionConfig, ChannelMixingConfig, RWKV7Config
from intarsia.model import InferenceModel, LanguageModel
from intarsia.ops import Sequences

MIXERS = {
    "time": RWKV7Config(2, 8, 12, decay_rank=5, rate_rank=6, gate_rank=7, value_rank=3),
    "channels": ChannelMixingConfig(20),
    "attention": AttentionConfig(2, 8),
}
RWKV = {
    "layout": "time channels time channels", "mixers": MIXERS, "mixer_only": ("time", "channels"), "norm": "layer",
    "embed_norm": True, "experts": None,
}  # fmt: skip


def gradients(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, targets=tokens).nll.sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recomputed_and_compiled_blocks_hand_values_on(make_model, tokens):
    """With the same gradients, those of the first layer's values too."""
    model = make_model(**RWKV).double()
    expected = gradients(model, tokens)
    assert expected["blocks.2.mixer.value_mix_bias"].abs().max() > 0
    model.activation_checkpointing = True
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    model.activation_checkpointing = False
    model.compile_blocks(backend="eager")
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_values_of_the_first_layer_reach_the_later_ones(make_model, tokens):
    """A change of the first layer's values alone changes what the third block makes of the same input."""
    model = make_model(**RWKV).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = model.blocks[0](x).handed
    assert model.blocks[1](x, handed=first).handed is first
    changed = first._replace(values=first.values + 1)
    one, other = (model.blocks[2](x, handed=each).y for each in (first, changed))
    assert (one - other).abs().max() > 1e-3
    with torch.no_grad():
        expected = model(tokens).logits
        states = model.init_states(3)
        packed = tokens[:, :12].reshape(1, -1)[:, :20]
        output = model(packed, states=states, seqs=Sequences((12, 0, 8)))
    torch.testing.assert_close(output.logits[:, :12], expected[:1, :12])
    torch.testing.assert_close(output.logits[0, 12:], expected[1, :8])
    assert output.states.tokens == (12, 0, 8)


def test_it_decodes_when_made_ready(make_model, tokens):
    model = make_model(**RWKV)
    ready = InferenceModel(model)
    assert ready.few_tokens is None
    states, logits = ready.init_states(2), []
    for piece in tokens[:, :20].split([13, *[1] * 7], dim=1):
        output = ready(piece, states, last_only=False)
        states = output.states
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens[:, :20]).logits, rtol=1e-4, atol=1e-4)


def test_the_first_layer_must_be_one_of_them(make_model, tokens):
    with pytest.raises(ConfigError, match="first layer"):
        make_model(**{**RWKV, "layout": "attention channels time channels"})(tokens)
