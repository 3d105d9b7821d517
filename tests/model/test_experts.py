"""Mixture of experts against a reference that serves one token after the other, in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from intarsia.model import grouped
from intarsia.model.config import ExpertsConfig
from intarsia.model.experts import Experts
from intarsia.model.grouped import grouped_linear, grouped_outer
from intarsia.model.initialization import init_weights

CONFIG = ExpertsConfig(num_experts=8, d_hidden=16, num_active=3, num_shared=1, routed_scaling_factor=2.5)
GROUPED = dataclasses.replace(CONFIG, num_groups=4, num_active_groups=2)


def layer(config=CONFIG, d_model=24, dtype=torch.float32):
    module = Experts(d_model, config)
    init_weights(module, seed=1, std=0.5, depth=1)
    # A bias that changes some choices and not all.
    generator = torch.Generator().manual_seed(2)
    module.router.bias.normal_(0, 0.1, generator=generator)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
    return module.to(dtype)


def tokens(n=40, d_model=24, dtype=torch.float32):
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def inner(gate, up, config):
    """What is inside an expert, of one token."""
    if config.activation == "relu2":
        return up * up * (up > 0)
    if config.activation == "clamped":
        limit = config.limit or 7
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
        return gate / (1 + torch.exp(-config.sharpness * gate)) * (1 + up)
    if config.activation == "situ":
        limit, up_limit = config.limit or 1, config.up_limit
        up = up if up_limit is None else up_limit * (1 - 2 / (torch.exp(2 * up / up_limit) + 1))
        return limit * (1 - 2 / (torch.exp(2 * gate / limit) + 1)) / (1 + torch.exp(-gate)) * up
    return F.silu(gate) * up


def reference(module, x):
    """The layer's output, one token at a time: the specification."""
    config, out = module.config, []
    for token in x:
        logits = module.router.weight @ token
        if config.biases:
            logits = logits + module.router.logit_bias
        scores = logits.sigmoid() if config.scores == "sigmoid" else logits.exp() / logits.exp().sum()
        biased = scores + module.router.bias
        size = config.num_experts // config.num_groups
        groups = [biased[g * size : (g + 1) * size] for g in range(config.num_groups)]
        strength = torch.stack([group.sort(descending=True).values[:2].sum() for group in groups])
        used = strength.argsort(descending=True)[: config.num_active_groups].tolist()
        eligible = [e for e in range(config.num_experts) if e // size in used]
        chosen = sorted(eligible, key=lambda e: -biased[e].item())[: config.num_active]
        weights = [(biased if config.routing_weights == "biased" else scores)[e] for e in chosen]
        total = sum(weights) if config.normalize else 1
        y = torch.zeros_like(token)
        if module.shared is not None:
            up = module.shared.up.weight @ token
            gate = up if config.activation == "relu2" else module.shared.gate.weight @ token
            y = module.shared.down.weight @ inner(gate, up, config)
        if config.shared_gate:
            y = y / (1 + torch.exp(-(module.shared_gate.weight @ token)))
        narrow = config.d_latent is not None
        routed = torch.zeros_like(module.down[0, :, 0])
        for e, weight in zip(chosen, weights, strict=True):
            h = module.gate_up[e] @ (module.latent_down.weight @ token if narrow else token)
            h = h + module.gate_up_bias[e] if config.biases else h
            h = module.down[e] @ inner(*((h, h) if config.activation == "relu2" else h.chunk(2)), config)
            routed = routed + config.routed_scaling_factor * weight / total * (
                h + module.down_bias[e] if config.biases else h
            )
        if config.latent_norm:
            routed = module.latent_norm.weight * routed / (routed.square().mean() + 1e-5).sqrt()
        out.append(y + (module.latent_up.weight @ routed if narrow else routed))
    return torch.stack(out)


def gradients(module, x, y):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    return torch.autograd.grad(y, (x, *module.parameters()), upstream)


CONFIGS = {
    "plain": CONFIG,
    "grouped": GROUPED,
    "biased": dataclasses.replace(CONFIG, routing_weights="biased"),
    "not normalized": dataclasses.replace(CONFIG, normalize=False),
    "no shared expert": dataclasses.replace(CONFIG, num_shared=0),
    "two shared experts": dataclasses.replace(CONFIG, num_shared=2),
    "all experts": dataclasses.replace(CONFIG, num_active=8),
    # Rows that are no multiple of 16 bytes, which grouped_mm does not take.
    "odd": dataclasses.replace(CONFIG, d_hidden=7),
    "softmax, gated shared expert": dataclasses.replace(CONFIG, scores="softmax", shared_gate=True),
    "without gates": dataclasses.replace(CONFIG, activation="relu2"),
    "latent": dataclasses.replace(CONFIG, d_latent=10),
    "latent, without gates, odd": dataclasses.replace(CONFIG, d_latent=5, d_hidden=7, activation="relu2"),
    "latent, normed": dataclasses.replace(CONFIG, d_latent=10, latent_norm=True),
    "clamped by little": dataclasses.replace(CONFIG, activation="clamped", limit=5.0, sharpness=1.1),
    "situ": dataclasses.replace(CONFIG, activation="situ"),
    "situ, both held": dataclasses.replace(CONFIG, activation="situ", limit=0.4, up_limit=0.6),
    "biases, clamped": dataclasses.replace(CONFIG, scores="softmax", biases=True, activation="clamped"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(name, dtype):
    module, x = layer(CONFIGS[name], dtype=dtype), tokens(dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(module).double()
    exact_x = x.detach().double().requires_grad_()
    expected = reference(exact, exact_x)
    pairs = [(y, expected), *zip(gradients(module, x, y), gradients(exact, exact_x, expected), strict=True)]
    for got, want in pairs:
        tolerance = 20 * torch.finfo(torch.float32).eps if dtype != torch.bfloat16 else 2**-6
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_the_bias_changes_choices_and_nothing_else():
    module, x = layer(), tokens()
    chosen, weights = module.router(x)
    module.router.bias.zero_()
    chosen_without, weights_without = module.router(x)
    same = (chosen.sort().values == chosen_without.sort().values).all(-1)
    assert 0 < same.sum() < len(x), "the example has both kinds of tokens"
    torch.testing.assert_close(
        weights[same].gather(1, chosen[same].argsort()),
        weights_without[same].gather(1, chosen_without[same].argsort()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_serves_what_the_loop_serves(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(5, 8, 16, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([0, 7, 7, 8, 20])
    assert grouped._grouped_mm_serves(x, weight)
    fast = grouped_linear(x, weight, ends)
    fast_grads = torch.autograd.grad(fast.square().sum(), (x, weight))
    monkeypatch.setattr(grouped, "_grouped_mm_serves", lambda *_: False)
    slow = grouped_linear(x, weight, ends)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_grads, torch.autograd.grad(slow.square().sum(), (x, weight)))


@pytest.mark.parametrize("width", [8, 7])
def test_the_operators_keep_the_rules_of_operators(width):
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, width, 16, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 7, 7, 8, 20])
    torch.library.opcheck(grouped_linear, (x, weight, ends))
    torch.library.opcheck(grouped_linear, (x.detach(), weight.detach().mT.contiguous().mT, ends))
    torch.library.opcheck(grouped_outer, (torch.randn(20, width), torch.randn(20, 16), ends))
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))


def test_autocast_rounds_products_and_not_the_router():
    module, x = layer(), tokens()
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        chosen, weights = module.router(x)
        y = module(x)
    torch.testing.assert_close((chosen, weights), module.router(x), rtol=0, atol=0)
    assert (y - plain).norm() < 2**-6 * plain.norm()


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_the_router_stays_float32(cast):
    module, x = layer(), tokens()
    before = module.router(x)
    cast(module)
    assert module.down.dtype.itemsize == 2
    assert {t.dtype for t in (module.router.weight, module.router.bias)} == {torch.float32}
    torch.testing.assert_close(module.router(x), before, rtol=0, atol=0)


def test_no_python_loop_over_tokens():
    module = layer()
    counted = [0]

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[0] += 1
            return func(*args, **(kwargs or {}))

    calls = []
    for n in (10, 1000):
        counted[0] = 0
        with Count(), torch.no_grad():
            module(tokens(n))
        calls.append(counted[0])
    assert calls[0] == calls[1]


def test_the_load_is_what_the_experts_are_given():
    module, x = layer(), tokens()
    y, side = module(x, side=("load",))
    assert torch.equal(y, module(x))
    chosen, _ = module.router(x)
    assert torch.equal(side.load, chosen.flatten().bincount(minlength=8).float())
    assert side.load.sum() == 40 * CONFIG.num_active


def test_tokens_that_do_not_count_are_no_load():
    module, x = layer(), tokens()
    counted = torch.arange(len(x)) % 3 > 0
    y, side = module(x, counted, ("load",))
    assert torch.equal(y, module(x)), "they are served all the same"
    chosen, _ = module.router(x[counted])
    assert torch.equal(side.load, chosen.flatten().bincount(minlength=8).float())
    _, side = module(x.view(2, -1, x.shape[-1]), counted.view(2, -1), ("load",))
    assert torch.equal(side.load, chosen.flatten().bincount(minlength=8).float())


def test_shapes_and_few_tokens():
    module = layer()
    x = tokens(6)
    torch.testing.assert_close(module(x.view(2, 3, 24)).flatten(0, 1), module(x))
    torch.testing.assert_close(module(x[:1]), module(x)[:1])
    assert module(x[:0]).shape == (0, 24)


def test_fewer_experts_work_than_there_are():
    # Tokens of one kind: all rows go to the same three experts, the others get none and a zero gradient.
    module = layer()
    x = tokens(1).detach().expand(9, -1)
    (grad,) = torch.autograd.grad(module(x).sum(), module.down)
    used = module.router(x)[0][0]
    idle = torch.ones(8, dtype=torch.bool).scatter(0, used, False)
    assert (grad[idle] == 0).all()
    assert all(grad[expert].any() for expert in used)
