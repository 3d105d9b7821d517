"""Named parameters and buffers keep float32 through casts, moves and loading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intarsia.layers.float32 import KeepsFloat32
from intarsia.mixers import KDAConfig


class Decay(KeepsFloat32):
    float32_names = ("A_log", "bias", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(0, 1, 7))
        self.weight = nn.Parameter(torch.linspace(0, 1, 7))
        self.register_buffer("bias", torch.linspace(-1, 0, 7))


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.type(torch.float16)]
)
def test_values_survive_narrow_casts(cast):
    model = nn.Sequential(nn.Linear(2, 2), Decay())
    identity = model[1].A_log
    model[1].A_log.grad = torch.full((7,), 1 / 3)
    cast(model)
    assert model[0].weight.dtype.itemsize == 2
    assert model[1].weight.dtype.itemsize == 2
    assert model[1].A_log is identity, "the optimizer must go on seeing the same parameter"
    assert torch.equal(model[1].A_log, torch.linspace(0, 1, 7))
    assert torch.equal(model[1].A_log.grad, torch.full((7,), 1 / 3))
    assert torch.equal(model[1].bias, torch.linspace(-1, 0, 7))


def test_float64_and_meta_are_obeyed():
    assert Decay().double().A_log.dtype == torch.float64
    module = Decay().to("meta", torch.bfloat16)
    assert module.A_log.is_meta
    assert module.A_log.dtype == torch.float32
    assert module.to_empty(device="cpu").A_log.dtype == torch.float32


def test_what_is_made_narrow_is_widened():
    """As from_pretrained and its kind make models."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = KDAConfig(2, 8).build(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert mixer.decay.A_log.dtype == mixer.decay.dt_bias.dtype == torch.float32
    rates = mixer.decay.A_log.exp()
    assert ((rates >= 1) & (rates <= 16)).all()
    assert not torch.equal(rates, rates.bfloat16().float()), "drawn in float32"
    module = Decay()
    module.bias = torch.zeros(7)
    module.A_log = nn.Parameter(torch.ones(7, dtype=torch.bfloat16), requires_grad=False)
    assert module.A_log.dtype == torch.float32
    assert not module.A_log.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_loading_widens(assign):
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in Decay().state_dict().items()}
    module = Decay()
    module.load_state_dict(narrow, assign=assign)
    assert module.A_log.dtype == module.bias.dtype == torch.float32
    assert narrow["A_log"].dtype == torch.bfloat16, "the caller's dictionary is not changed"
