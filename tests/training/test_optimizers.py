"""Every parameter has one role, one optimizer and the weight decay that it should have."""

from __future__ import annotations

import copy

import pytest
import torch

from intarsia.errors import TrainingError
from intarsia.model import LanguageModel
from intarsia.training import TrainConfig
from intarsia.training.muon import Muon
from intarsia.training.optimizers import DECAYED_ROLES, MUON_ROLES, build_optimizers, parameter_roles


@pytest.fixture
def model(model_config):
    model = LanguageModel(model_config)
    model.init_weights(0)
    return model


def test_roles(model):
    roles = parameter_roles(model)
    assert roles["embed.weight"] == "embedding"
    assert "head.weight" not in roles, "a tied head is the embedding"
    assert roles["norm.weight"] == roles["blocks.0.mixer_norm.weight"] == "vector"
    assert roles["blocks.0.mixer.q_proj.weight"] == "matrix"
    assert roles["blocks.1.mixer.kv_up_proj.weight"] == "matrix"
    assert roles["blocks.0.feed_forward.down.weight"] == "matrix"
    assert roles["blocks.1.feed_forward.gate_up"] == "fused experts"
    assert roles["blocks.1.feed_forward.down"] == "experts"
    assert roles["blocks.1.feed_forward.router.weight"] == "router"
    assert roles["blocks.1.feed_forward.shared.up.weight"] == "matrix"
    for name, role in roles.items():
        if any(part in name for part in ("A_log", "dt_bias", "conv", "norm")):
            assert role == "vector", name
    assert set(roles) == {name for name, _ in model.named_parameters()}


def test_an_untied_head_is_decayed_and_the_embedding_is_not(model_config):
    model = LanguageModel(model_config.replace(tie_embeddings=False))
    groups = {group["role"]: group for group in build_optimizers(model, TrainConfig(steps=1)).groups()}
    assert groups["head"]["weight_decay"] == 0.1
    assert groups["head"]["params"] == [model.head.weight]
    assert groups["embedding"]["weight_decay"] == groups["vector"]["weight_decay"] == 0
    assert groups["matrix"]["weight_decay"] == groups["router"]["weight_decay"] == 0.1


def test_muon_has_the_matrices_and_adamw_the_rest(model):
    muon, adamw = build_optimizers(model, TrainConfig(steps=1, lr=0.5, adamw_lr_scale=0.1)).members
    assert isinstance(muon, Muon)
    assert {group["role"]: group["fused"] for group in muon.param_groups} == {
        "matrix": 1,
        "experts": 1,
        "fused experts": 2,
    }
    assert {group["peak_lr"] for group in muon.param_groups} == {0.5}
    assert {group["peak_lr"] for group in adamw.param_groups} == {0.05}


def test_adamw_alone_ignores_the_scale(model):
    optimizers = build_optimizers(model, TrainConfig(steps=1, lr=0.5, adamw_lr_scale=0.1, optimizer="adamw"))
    assert len(optimizers.members) == 1
    assert {group["peak_lr"] for group in optimizers.groups()} == {0.5}
    optimizers.set_multiplier(0.5)
    assert {group["lr"] for group in optimizers.groups()} == {0.25}


def test_a_frozen_parameter_is_left_out(model):
    model.embed.weight.requires_grad_(False)
    held = [p for group in build_optimizers(model, TrainConfig(steps=1)).groups() for p in group["params"]]
    assert all(p is not model.embed.weight for p in held)


def test_a_parameter_that_is_claimed_twice_is_found(model, monkeypatch):
    original = torch.optim.AdamW.__init__

    def with_a_thief(self, groups, **options):
        original(self, [*groups, {"params": [model.blocks[0].mixer.q_proj.weight]}], **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", with_a_thief)
    with pytest.raises(TrainingError, match=r"q_proj.weight is claimed by 2 optimizer groups"):
        build_optimizers(model, TrainConfig(steps=1))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_fused_step_is_a_loop_over_the_parameters(model, train_config, optimizer):
    """All parameters of a group in a few calls, as each alone in PyTorch's plain loop, or in a Muon of its own."""
    config = train_config.replace(optimizer=optimizer, lr=1e-2)
    alone = copy.deepcopy(model)
    fused = build_optimizers(model, config)
    roles, plain = parameter_roles(alone), []
    for name, parameter in alone.named_parameters():
        decay = 0.1 if roles[name] in DECAYED_ROLES else 0.0
        if optimizer == "muon" and roles[name] in MUON_ROLES:
            halves = 2 if roles[name] == "fused experts" else 1
            options = {"momentum": config.muon_momentum, "weight_decay": decay}
            plain.append(Muon([{"params": [parameter], "fused": halves}], lr=1e-2, **options))
        else:
            options = {"betas": config.adamw_betas, "eps": config.adamw_eps, "weight_decay": decay}
            plain.append(torch.optim.AdamW([parameter], lr=1e-2, foreach=False, fused=False, **options))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        fused.set_multiplier(1.0)
        fused.step()
        for each in plain:
            each.step()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        # AdamW rounds some ten times a step, each time by half a unit of what it adds to. Five rounds of Newton–Schulz
        # multiply what the order of summation changes by their slope at zero, 3.4, each; three steps add up.
        eps = torch.finfo(torch.float32).eps
        room = 3 * (10 if roles[name] not in MUON_ROLES or optimizer == "adamw" else 3.4445**5) * eps
        scale = max(float(theirs.detach().abs().max()), 1e-2)
        assert (ours - theirs).abs().max() <= room * scale, name
