"""The additive mixers against transcriptions of their papers' equations: from the weights, in float64, written apart
from the layers and their operators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.mixers import MixerConfig
from intarsia.mixers.gla import GLAConfig
from intarsia.mixers.hgrn2 import HGRN2Config, forget_gate
from intarsia.mixers.linear_attention import LinearAttentionConfig
from intarsia.mixers.performer import PerformerConfig, orthogonal_features
from intarsia.mixers.retnet import RetNetConfig
from intarsia.mixers.trnn import TRNNConfig

D, T, EPS = 24, 37, 1e-5
Weights = dict[str, Tensor]


def run(config: MixerConfig, std: float = 0.3) -> tuple[Tensor, Weights, Tensor]:
    """Inputs, weights and outputs of a layer whose weights are large enough to matter."""
    mixer = config.build(D, EPS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in mixer.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "norm.weight"), std=std, generator=generator)
    x = torch.randn(2, T, D, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer.double()(x)
    return x, {**mixer.state_dict(), **dict(mixer.named_buffers())}, y


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """`W x` as `[B, T, heads, channels]`."""
    y = torch.einsum("btd,cd->btc", x, weight)
    return y.reshape(*y.shape[:2], count, -1)


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def project(o: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("btc,dc->btd", o.flatten(2), weight)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", [LinearAttentionConfig(2, 8), LinearAttentionConfig(3, 6, 10, eps=0.1)])
def test_linear_attention_is_equation_9_of_the_paper(config: LinearAttentionConfig) -> None:
    x, w, y = run(config)
    H = config.num_heads
    q, k, v = (heads(x, w[f"{n}_proj.weight"], H) for n in "qkv")
    f_q, f_k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    o = torch.zeros_like(v)
    for i in range(T):
        # The paper's sums over all j <= i, with no state at all.
        weight = (f_q[:, i, None] * f_k[:, : i + 1]).sum(-1)
        o[:, i] = (weight[..., None] * v[:, : i + 1]).sum(1) / (weight.sum(1)[..., None] + config.eps)
    close(y, project(o, w["o_proj.weight"]))


@pytest.mark.parametrize("config", [PerformerConfig(2, 8, num_features=20), PerformerConfig(3, 6, 10, 7, 5)])
def test_performer_is_its_estimate_of_the_attention_matrix(config: PerformerConfig) -> None:
    x, w, y = run(config)
    H, d, eps = config.num_heads, config.head_dim, config.eps
    q, k, v = (heads(x, w[f"{n}_proj.weight"], H) for n in "qkv")

    def exponents(t: Tensor) -> Tensor:
        t = t / d**0.25
        return torch.einsum("bthd,md->bthm", t, w["features"]) - (t * t).sum(-1)[..., None] / 2

    e_q, e_k = exponents(q), exponents(k)
    f_q = torch.exp(e_q - e_q.max(-1, keepdim=True).values) + eps
    f_k = torch.exp(e_k) + eps
    A = torch.einsum("bihm,bjhm->bhij", f_q, f_k).tril()
    close(y, project(torch.einsum("bhij,bjhv->bihv", A / A.sum(-1, keepdim=True), v), w["o_proj.weight"]))


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors() -> None:
    features = orthogonal_features(4000, 8, seed=3)
    for block in features.split(8):
        gram = block @ block.mT
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)
    # The squared length of a Gaussian vector of 8 channels has mean 8 and variance 16.
    squares = features.square().sum(-1)
    assert abs(squares.mean() - 8) < 0.3
    assert abs(squares.var() - 16) < 2
    assert torch.equal(features, orthogonal_features(4000, 8, seed=3))
    assert not torch.equal(features, orthogonal_features(4000, 8, seed=4))


def test_performer_estimates_softmax_attention() -> None:
    config = PerformerConfig(2, 8, num_features=40_000, eps=1e-9)
    # The estimate's variance grows exponentially with the lengths of queries and keys: let them be short.
    x, w, y = run(config, std=0.15)
    q, k, v = (heads(x, w[f"{n}_proj.weight"], 2) for n in "qkv")
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    A = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = project(torch.einsum("bhij,bjhv->bihv", A, v), w["o_proj.weight"])
    assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_performer_stays_finite_for_keys_of_any_length(dtype: torch.dtype) -> None:
    # The longest exponent a key can reach is half a feature's squared length: a key along a feature reaches it.
    mixer = PerformerConfig(1, 256, num_features=8).build(256)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(mixer, name).weight.copy_(torch.eye(256))
    x = mixer.features[0] * 256**0.25 * torch.tensor([0.0, 1.0, 10.0, 1e4])[:, None]
    y, _ = mixer.to(dtype)(x[None].to(dtype).repeat(1, 50, 1))
    assert y.isfinite().all()


def test_performer_draws_other_features_in_every_layer_and_keeps_them_float32() -> None:
    config = PerformerConfig(2, 8, num_features=20, seed=1)
    first, second = (config.at_layer(layer, 2).build(D) for layer in (0, 1))
    assert not torch.equal(first.features, second.features)
    kept = first.features.clone()
    assert torch.equal(first.to(torch.bfloat16).features, kept)
    assert "features" not in first.state_dict()
    empty = PerformerConfig(2, 8, num_features=20, seed=1).build(D).to("meta").to_empty(device="cpu")
    empty.init_own_buffers()
    assert torch.equal(empty.features, kept)
    with pytest.raises(ConfigError, match="seed"):
        PerformerConfig(2, 8, seed=-1)


@pytest.mark.parametrize("config", [RetNetConfig(3, 8), RetNetConfig(2, 2, 10), RetNetConfig(4, 6, 6)])
def test_retnet_is_the_parallel_form_of_the_paper(config: RetNetConfig) -> None:
    x, w, y = run(config)
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    q, k, v = (heads(x, w[f"{n}_proj.weight"], H) for n in "qkv")
    # Equation 5: (Q Theta)(K conj Theta)ᵀ with Theta_n = exp(i n theta), pairs of channels as complex numbers.
    theta = torch.tensor([10000 ** (-i / max(K // 2 - 1, 1)) for i in range(K // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(T, K // 2, dtype=torch.float64), torch.arange(T)[:, None] * theta)
    q, k = (torch.complex(*t.chunk(2, -1)) * turn[None, :, None] for t in (q, k))
    scores = torch.einsum("bihk,bjhk->bhij", q, k.conj()).real / math.sqrt(K)
    gamma = torch.tensor([1 - 2 ** (-5.0 - h) for h in range(H)], dtype=torch.float64)
    n = torch.arange(T)
    D_nm = (gamma[:, None, None] ** (n[:, None] - n)).tril()
    o = torch.einsum("bhij,bjhv->bihv", scores * D_nm, v)
    gate = swish(heads(x, w["output_gate_proj.weight"], H))
    assert o.shape[-1] == V
    close(y, project(gate * rms(o), w["o_proj.weight"]))


@pytest.mark.parametrize("config", [GLAConfig(2, 8, decay_rank=5), GLAConfig(3, 6, 10, None, tau=1.0)])
def test_gla_is_the_recurrence_of_the_paper(config: GLAConfig) -> None:
    x, w, y = run(config)
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    q, k, v = (heads(x, w[f"{n}_proj.weight"], H) for n in "qkv")
    if config.decay_rank is None:
        logits = heads(x, w["decay_proj.weight"], H)
    else:
        logits = heads(x, w["decay_proj.1.weight"] @ w["decay_proj.0.weight"], H)
    alpha = sigmoid(logits + w["decay.bias"].reshape(H, K)) ** (1 / config.tau)
    S = torch.zeros(2, H, K, V, dtype=torch.float64)
    o = torch.zeros_like(v)
    for t in range(T):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o[:, t] = (q[:, t, :, :, None] * S).sum(2) / math.sqrt(K)
    gate = swish(heads(x, w["output_gate_proj.weight"], H))
    close(y, project(gate * rms(o) * w["norm.weight"], w["o_proj.weight"]))


@pytest.mark.parametrize("config", [HGRN2Config(2, 8), HGRN2Config(3, 6, 10, lower_bound=0.7)])
def test_hgrn2_is_the_recurrence_of_the_paper(config: HGRN2Config) -> None:
    x, w, y = run(config)
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    b = config.lower_bound or 0.0
    f = b + (1 - b) * sigmoid(heads(x, w["forget_proj.weight"], H))
    q, i = swish(heads(x, w["q_proj.weight"], H)), heads(x, w["v_proj.weight"], H)
    S = torch.zeros(2, H, K, V, dtype=torch.float64)
    o = torch.zeros_like(i)
    for t in range(T):
        S = f[:, t, :, :, None] * S + (1 - f[:, t, :, :, None]) * i[:, t, :, None, :]
        o[:, t] = (q[:, t, :, :, None] * S).sum(2) / math.sqrt(K)
    close(y, project(rms(o.flatten(2)) * w["norm.weight"], w["o_proj.weight"]))


def test_hgrn2_has_the_bounds_that_the_authors_begin_with() -> None:
    depth = 6
    shares = torch.zeros(depth, dtype=torch.float64).softmax(0)
    for layer, bound in enumerate(shares.cumsum(0) - shares[0]):
        assert HGRN2Config(2, 8).at_layer(layer, depth).lower_bound == pytest.approx(bound.item())
        assert HGRN2Config(2, 8, lower_bound=0.5).at_layer(layer, depth).lower_bound == 0.5
    with pytest.raises(ConfigError, match="lower_bound"):
        HGRN2Config(2, 8, lower_bound=1.0)


@pytest.mark.parametrize("bound", [0.0, 0.25])
def test_forget_gates_are_exact_in_float32_however_wide_open_or_shut(bound: float) -> None:
    z = torch.linspace(-80, 80, 161, dtype=torch.float32, requires_grad=True)
    k, g = forget_gate(z, bound)
    exact = z.detach().double()
    lost = torch.sigmoid(-exact)
    torch.testing.assert_close(k.double(), (1 - bound) * lost, rtol=1e-6, atol=0)
    expected = -torch.log1p(torch.exp(-exact)) if bound == 0 else torch.log1p(-(1 - bound) * lost)
    torch.testing.assert_close(g.double(), expected, rtol=2e-6, atol=0)
    (k + g).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("config", [TRNNConfig(), TRNNConfig(channels=10)])
def test_trnn_is_the_recurrence_of_the_paper(config: TRNNConfig) -> None:
    x, w, y = run(config)
    z = torch.einsum("btd,cd->btc", x, w["v_proj.weight"])
    f = sigmoid(torch.einsum("btd,cd->btc", x, w["decay_proj.weight"]) + w["decay.bias"])
    h = torch.zeros_like(z)
    last = torch.zeros_like(z[:, 0])
    for t in range(T):
        last = h[:, t] = f[:, t] * last + (1 - f[:, t]) * z[:, t]
    close(y, project(h, w["o_proj.weight"]))
