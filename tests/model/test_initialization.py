"""Weights depend on the seed and on names alone, and nothing is forgotten."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from intarsia.errors import ConfigError
from intarsia.mixers import KDAConfig, Mixer
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
    router = model.blocks[1].feed_forward.router
    router.bias.fill_(3)
    before = weights(model)
    init_buffers(model)
    assert (router.bias == 0).all()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


class Plain(nn.Module):
    """A model of somebody else's, with one mixer and many kinds of PyTorch's modules."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 12, padding_idx=2)
        self.norm = nn.LayerNorm(12)
        self.batch_norm = nn.BatchNorm1d(12)
        self.conv = nn.Conv1d(12, 12, 3)
        self.lstm = nn.LSTM(12, 12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.mixer = KDAConfig(2, 6).build(12)
        self.own = OwnReset()
        self.head = nn.Linear(12, 9)


class OwnReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(12))

    def reset_parameters(self):
        nn.init.uniform_(self.scale, 1, 2)


def test_foreign_modules():
    torch.manual_seed(0)
    first, second = Plain(), Plain().to_empty(device="cpu")
    before = torch.get_rng_state()
    with torch.no_grad():
        for tensor in (*second.parameters(), second.batch_norm.running_mean, second.batch_norm.running_var):
            tensor.fill_(math.nan)
    init_weights(first, seed=1, std=0.02, depth=2)
    init_weights(second, seed=1, std=0.02, depth=2)
    assert torch.equal(before, torch.get_rng_state())
    values, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(values[name], other[name]) for name in values)
    assert all(tensor.isfinite().all() for tensor in values.values())
    assert (values["norm.weight"] == 1).all()
    assert (values["batch_norm.running_var"] == 1).all()
    assert (values["embed.weight"][2] == 0).all()
    assert (values["own.scale"] >= 1).all()
    assert (values["head.bias"] == 0).all()
    assert values["mixer.o_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(4), rel=0.2)
    init_weights(second, seed=2, std=0.02, depth=2)
    for name in ("own.scale", "conv.weight", "lstm.weight_hh_l0", "attention.in_proj_weight", "embed.weight"):
        assert not torch.equal(values[name], second.state_dict()[name]), name


def test_a_mixer_alone_is_as_reproducible():
    first, second = (KDAConfig(2, 6).build(12) for _ in range(2))
    assert not torch.equal(first.q_proj.weight, second.q_proj.weight)
    for mixer in (first, second):
        init_weights(mixer, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_nobody_knows_may_be_kept():
    model = nn.Sequential(nn.Linear(2, 2), Forgetful(buffers=1))
    with torch.no_grad():
        model[1].w0.fill_(5)
        model[1].b0.fill_(6)
    init_weights(model, seed=0, unknown="keep")
    assert (model[1].w0 == 5).all()
    assert (model[1].b0 == 6).all()
    with pytest.raises(ConfigError, match=r"nobody fills 1\.w0"):
        init_weights(model.to("meta"), seed=0, unknown="keep")


def test_a_mixer_that_forgets_its_buffer_is_refused():
    class Careless(Mixer):
        residual_outputs = ()

        def __init__(self):
            super().__init__(d_model=1)
            self.register_buffer("b", torch.zeros(2))

    with pytest.raises(ConfigError, match=r"Careless\.init_own_buffers must do it"):
        init_weights(Careless(), seed=0)


def test_a_mixer_whose_output_has_another_name_is_told():
    class Renamed(Mixer):
        def __init__(self):
            super().__init__(d_model=8)
            self.out = nn.Linear(2, 2)

    with pytest.raises(ConfigError, match=r"Renamed has no o_proj: name there what does"):
        init_weights(Renamed(), seed=0)
