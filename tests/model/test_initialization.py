"""Weights depend on the seed and on names alone, and nothing is forgotten."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from intarsia.errors import ConfigError
from intarsia.model import LanguageModel, presets
from intarsia.model.initialization import init_buffers, init_weights


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_same_seed_gives_the_same_weights_and_another_others(make_model):
    torch.manual_seed(1)
    first = weights(make_model(seed=3))
    torch.manual_seed(2)
    second, other = weights(make_model(seed=3)), weights(make_model(seed=4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert {"embed.weight", "blocks.0.mixer.o_proj.weight", "blocks.1.feed_forward.gate_up"} <= set(drawn)


def test_arms_share_what_has_the_same_name_and_shape(make_model):
    hybrid = weights(make_model(layout="kda kda kda mla", experts=None, dense_layers=0))
    full = weights(make_model(layout="mla mla mla mla", experts=None))
    shared = [name for name in hybrid if name in full and hybrid[name].shape == full[name].shape]
    assert {"embed.weight", "blocks.0.feed_forward.up.weight", "blocks.3.mixer.q_proj.weight"} <= set(shared)
    assert all(torch.equal(hybrid[name], full[name]) for name in shared)
    # Names differ, so numbers do.
    assert not torch.equal(
        hybrid["blocks.0.feed_forward.up.weight"], hybrid["blocks.1.feed_forward.up.weight"]
    )


def test_the_global_generator_is_left_alone(make_model):
    model = make_model()
    before = torch.get_rng_state()
    model.init_weights(7)
    assert torch.equal(before, torch.get_rng_state())


def test_meta_then_empty(make_model):
    built = make_model(seed=5)
    with torch.device("meta"):
        model = LanguageModel(built.config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan)
    model.init_weights(5)
    for name, tensor in built.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for (name, buffer), (_, fresh) in zip(built.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, fresh), name
    assert model.head.weight is model.embed.weight


def test_narrow_models_get_the_rounded_numbers(make_model):
    wide, narrow = make_model(seed=5), make_model(seed=5).to(torch.bfloat16)
    narrow.init_weights(5)
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, wide.get_parameter(name).to(parameter.dtype)), name


def test_the_policy():
    model = LanguageModel(presets.get("kimi-linear-tiny-moe", init_std=0.05))
    model.init_weights(0)
    depth = model.config.depth

    def std(name):
        return model.get_parameter(name).std().item()

    for name in ("embed.weight", "blocks.0.mixer.q_proj.weight", "blocks.1.feed_forward.gate_up"):
        assert std(name) == pytest.approx(0.05, rel=0.02), name
    outputs = ("0.mixer.o_proj.weight", "3.mixer.o_proj.weight", "0.feed_forward.down.weight")
    for name in (*outputs, "1.feed_forward.down", "1.feed_forward.shared.down.weight"):
        assert std(f"blocks.{name}") == pytest.approx(0.05 / math.sqrt(2 * depth), rel=0.02), name
    assert (model.norm.weight == 1).all()
    assert (model.blocks[1].feed_forward.router.bias == 0).all()


class Forgetful(nn.Module):
    def __init__(self, parameters=1, buffers=0):
        super().__init__()
        for i in range(parameters):
            self.register_parameter(f"w{i}", nn.Parameter(torch.zeros(2)))
        for i in range(buffers):
            self.register_buffer(f"b{i}", torch.zeros(2))


class HalfForgetful(Forgetful):
    def init_own_weights(self, generator_of, std):
        self.w0.normal_(0, std, generator=generator_of("w0"))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Forgetful(), "nobody fills 1.w0: Forgetful.init_own_weights must do it"),
        (HalfForgetful(parameters=2), "nobody fills 1.w1: HalfForgetful"),
        (HalfForgetful(parameters=1, buffers=1), "nobody fills 1.b0: HalfForgetful.init_own_buffers"),
    ],
)
def test_what_nobody_fills(module, message):
    model = nn.Sequential(nn.Linear(2, 2), module)
    with pytest.raises(ConfigError, match=message):
        init_weights(model, seed=0, std=1, depth=1)


def test_parameters_are_the_same_objects_afterwards():
    model = nn.Sequential(HalfForgetful())
    before = model[0].w0
    init_weights(model, seed=0, std=1, depth=1)
    assert model[0].w0 is before
    assert before.any()


def test_buffers_alone(make_model):
    model = make_model()
    router, mixer = model.blocks[1].feed_forward.router, model.blocks[2].mixer
    router.bias.fill_(3)
    mixer.max_logit.fill_(3)
    before = weights(model)
    init_buffers(model)
    assert (router.bias == 0).all()
    assert (mixer.max_logit == -torch.inf).all()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
