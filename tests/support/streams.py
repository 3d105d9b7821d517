"""What models whose residual stream is no single one must do as every other model."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.model import InferenceModel, LanguageModel


def logits_in_pieces(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Of tokens `[B, 70]` that are read in pieces, the states between them."""
    states, logits = model.init_states(tokens.shape[0]), []
    for piece in tokens.split([1, 40, 29], dim=1):
        output = model(piece, states=states)
        states = output.states
        logits.append(output.logits)
    return torch.cat(logits, 1)


def gradients(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """Of each parameter, as copies."""
    model.zero_grad()
    model(tokens, targets=tokens).nll.sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_gradients(model: LanguageModel, tokens: Tensor, expected: dict[str, Tensor]) -> None:
    """They are these."""
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def check_it_decodes_when_made_ready(model: LanguageModel, tokens: Tensor) -> None:
    """By its layers, with the model's logits, and in bfloat16 with finite ones."""
    ready = InferenceModel(model)
    assert ready.few_tokens is None
    output = ready(tokens[:, :9], ready.init_states(2), last_only=False)
    torch.testing.assert_close(output.logits, model(tokens[:, :9]).logits, rtol=1e-4, atol=1e-4)
    assert model.to(torch.bfloat16)(tokens[:, :9]).logits.isfinite().all()
