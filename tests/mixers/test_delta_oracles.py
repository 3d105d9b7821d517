"""The mixers of the delta family against their papers' recurrences, written out token by token in float64.

Nothing here calls the operators or the layers' parts: from the weights alone, by loops and small products.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.mixers import (
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNet2Config,
    KDAConfig,
    MixerConfig,
)
from support.oracles import inputs, layer, sigmoid, silu, softplus

D, T, EPS = 20, 37, 1e-5


def unit(x: Tensor) -> Tensor:
    """To length one over the last dimension, with the epsilon of the published layers."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of each channel's weighted sum of its last inputs: `[T, channels]`, weights `[channels, W]`."""
    W = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for back in range(min(W, t + 1)):
            y[t] += weight[:, W - 1 - back] * x[t - back]
    return silu(y)


def qkv(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one sequence `[T, D]`, behind the convolution where there is one."""
    projections = [x @ w[f"{name}_proj.weight"].T for name in "qkv"]
    if "conv.weight" in w:
        kernels = w["conv.weight"].split([p.shape[1] for p in projections])
        projections = [convolved(p, kernel) for p, kernel in zip(projections, kernels, strict=True)]
    q, k, v = projections
    return q, k, v


def output(w: dict[str, Tensor], x: Tensor, o: Tensor, gate: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Norm of each head `[T, H, V]`, gate and output projection."""
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + EPS) * w["norm.weight"]
    if gate is not None:
        o = o * gate((x @ w["output_gate_proj.weight"].T).view(o.shape))
    return o.flatten(1) @ w["o_proj.weight"].T


def deltanet(w: dict[str, Tensor], x: Tensor, config: DeltaNetConfig) -> Tensor:
    """Schlag et al. 2021, in their form: read the value that the key has, write the difference to the new one."""
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    q, k, v = qkv(w, x)
    q, k, v = q.view(T, H, K), k.view(T, H, K), v.view(T, H, V)
    if config.feature_map == "l2":
        q, k = unit(q), unit(k)
    else:
        q, k = (torch.where(y > 0, y + 1, torch.exp(y)) for y in (q, k))
        q, k = q / (q.sum(-1, keepdim=True) + 1e-6), k / (k.sum(-1, keepdim=True) + 1e-6)
    beta = (2 if config.negative_eigenvalues else 1) * sigmoid(x @ w["beta_proj.weight"].T)
    o = x.new_zeros(T, H, V)
    for h in range(H):
        memory = x.new_zeros(V, K)
        for t in range(T):
            old = memory @ k[t, h]
            memory = memory + beta[t, h] * torch.outer(v[t, h] - old, k[t, h])
            o[t, h] = memory @ q[t, h] / K**0.5
    gate = {"none": None, "swish": silu, "sigmoid": sigmoid}[config.output_gate]
    return output(w, x, o, gate)


def deltaproduct(w: dict[str, Tensor], x: Tensor, config: DeltaProductConfig) -> Tensor:
    """Siems et al. 2025: `H_i = A(x_i) H_{i-1} + B(x_i)`, A the product of n generalised Householder
    matrices `I - beta k kᵀ` (times the decay), B the sum of the writes, each erased by the steps behind it."""
    H, K, V, n = config.num_heads, config.head_dim, config.value_dim, config.steps
    q, k, v = qkv(w, x)
    q, k, v = unit(q.view(T, H, K)), unit(k.view(T, n, H, K)), v.view(T, n, H, V)
    beta = sigmoid(x @ w["beta_proj.weight"].T).view(T, n, H) * (2 if config.negative_eigenvalues else 1)
    alpha = x.new_ones(T, H)
    if config.decay:
        f = x @ w["decay_proj.weight"].T + w["decay.dt_bias"]
        alpha = torch.exp(-torch.exp(w["decay.A_log"]) * softplus(f))
    o = x.new_zeros(T, H, V)
    for h in range(H):
        memory = x.new_zeros(K, V)
        for t in range(T):
            A, B = alpha[t, h] * torch.eye(K, dtype=x.dtype), x.new_zeros(K, V)
            for j in range(n):
                key = k[t, j, h]
                householder = torch.eye(K, dtype=x.dtype) - beta[t, j, h] * torch.outer(key, key)
                A, B = householder @ A, householder @ B + beta[t, j, h] * torch.outer(key, v[t, j, h])
            memory = A @ memory + B
            o[t, h] = memory.T @ q[t, h] / K**0.5
    gate = {"none": None, "swish": silu, "sigmoid": sigmoid}[config.output_gate]
    return output(w, x, o, gate)


def gated_deltanet2(w: dict[str, Tensor], x: Tensor, config: GatedDeltaNet2Config) -> Tensor:
    """Hatamizadeh et al. 2026: `S_t = (I - k_t (b_t * k_t)ᵀ) D_t S_{t-1} + k_t (w_t * v_t)ᵀ`, read as they do: decay,
    read by the gated key, write what is new minus what was read."""
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    q, k, v = qkv(w, x)
    q, k, v = unit(q.view(T, H, K)), unit(k.view(T, H, K)), v.view(T, H, V)
    f = x @ w["decay_proj.0.weight"].T @ w["decay_proj.1.weight"].T + w["decay.dt_bias"]
    alpha = torch.exp(-torch.exp(w["decay.A_log"])[:, None] * softplus(f.view(T, H, K)))
    erase = sigmoid(x @ w["erase_proj.weight"].T).view(T, H, K) * (2 if config.negative_eigenvalues else 1)
    write = sigmoid(x @ w["write_proj.weight"].T).view(T, H, V)
    o = x.new_zeros(T, H, V)
    for h in range(H):
        memory = x.new_zeros(K, V)
        for t in range(T):
            memory = alpha[t, h][:, None] * memory
            old = memory.T @ (erase[t, h] * k[t, h])
            memory = memory + torch.outer(k[t, h], write[t, h] * v[t, h] - old)
            o[t, h] = memory.T @ q[t, h] / K**0.5
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + EPS) * w["norm.weight"]
    z = x @ w["output_gate_proj.0.weight"].T @ w["output_gate_proj.1.weight"].T + w["output_gate_proj.1.bias"]
    gate = {"swish": silu, "sigmoid": sigmoid}[config.output_gate]
    return (o * gate(z.view(o.shape))).flatten(1) @ w["o_proj.weight"].T


def kda(w: dict[str, Tensor], x: Tensor, config: KDAConfig) -> Tensor:
    """Kimi Linear report, equations 1 and 10: decay, take off what the key reads, write. With more value heads than
    key heads each has its own decay and strength, and value head h reads and writes with key head h / (HV / H)."""
    H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
    q, k, v = qkv(w, x)
    q, k, v = unit(q.view(T, H, K)), unit(k.view(T, H, K)), v.view(T, HV, V)
    f = x @ w["decay_proj.0.weight"].T @ w["decay_proj.1.weight"].T + w["decay.dt_bias"]
    alpha = torch.exp(-torch.exp(w["decay.A_log"])[:, None] * softplus(f.view(T, HV, K)))
    beta = sigmoid(x @ w["beta_proj.weight"].T)
    o = x.new_zeros(T, HV, V)
    for h in range(HV):
        memory, shared = x.new_zeros(K, V), h // (HV // H)
        for t in range(T):
            memory = alpha[t, h][:, None] * memory
            new = v[t, h] - memory.T @ k[t, shared]
            memory = memory + beta[t, h] * torch.outer(k[t, shared], new)
            o[t, h] = memory.T @ q[t, shared] / K**0.5
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + EPS) * w["norm.weight"]
    z = x @ w["output_gate_proj.0.weight"].T @ w["output_gate_proj.1.weight"].T
    if config.output_gate_bias:
        z = z + w["output_gate_proj.1.bias"]
    return (o * sigmoid(z.view(o.shape))).flatten(1) @ w["o_proj.weight"].T


def close(config: MixerConfig, oracle: Callable[..., Tensor]) -> None:
    mixer, x = layer(config, D, EPS), inputs(T, D)
    w = dict(mixer.named_parameters())
    expected = torch.stack([oracle(w, row, config) for row in x])
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "config",
    [
        DeltaNetConfig(2, 8, 6),
        DeltaNetConfig(3, 6, output_gate="swish", negative_eigenvalues=True),
        DeltaNetConfig(2, 8, 6, feature_map="elu", conv_size=None),
    ],
    ids=str,
)
def test_deltanet(config: DeltaNetConfig) -> None:
    close(config, deltanet)


@pytest.mark.parametrize(
    "config",
    [
        DeltaProductConfig(2, 8, 6),
        DeltaProductConfig(2, 6, 8, steps=3, decay=False, output_gate="none"),
        DeltaProductConfig(3, 8, steps=4, conv_size=None, output_gate="sigmoid", negative_eigenvalues=False),
    ],
    ids=str,
)
def test_deltaproduct(config: DeltaProductConfig) -> None:
    close(config, deltaproduct)


@pytest.mark.parametrize(
    "config",
    [
        GatedDeltaNet2Config(2, 8, 6),
        GatedDeltaNet2Config(
            2, 6, 8, conv_size=None, rank=3, negative_eigenvalues=True, output_gate="sigmoid"
        ),
    ],
    ids=str,
)
def test_gated_deltanet2(config: GatedDeltaNet2Config) -> None:
    close(config, gated_deltanet2)


@pytest.mark.parametrize(
    "config",
    [
        KDAConfig(2, 8, 6),
        KDAConfig(2, 8, 6, num_v_heads=4),
        KDAConfig(2, 6, num_v_heads=6, output_gate_bias=True, conv_size=None),
    ],
    ids=str,
)
def test_kda(config: KDAConfig) -> None:
    close(config, kda)


def test_gated_deltanet2_with_one_number_for_both_gates_is_kda() -> None:
    """The paper's own check: `b = w = beta` of a head."""
    H, K = 2, 8
    kda = layer(KDAConfig(H, K, output_gate="swish"), D, EPS)
    ours = GatedDeltaNet2Config(H, K).build(D, EPS).double().requires_grad_(False)
    weights = kda.state_dict()
    beta = weights.pop("beta_proj.weight").repeat_interleave(K, dim=0)
    weights |= {"erase_proj.weight": beta, "write_proj.weight": beta}
    weights["output_gate_proj.1.bias"] = torch.zeros(H * K, dtype=torch.float64)
    ours.load_state_dict(weights, strict=True)
    torch.testing.assert_close(ours(inputs(T, D))[0], kda(inputs(T, D))[0], rtol=1e-9, atol=1e-11)


def test_deltaproduct_of_one_step_is_deltanet() -> None:
    x = inputs(T, D)
    product = layer(DeltaProductConfig(2, 8, 6, steps=1, decay=False, output_gate="none"), D, EPS)
    delta = DeltaNetConfig(2, 8, 6, negative_eigenvalues=True).build(D, EPS).double()
    delta.load_state_dict(product.state_dict(), strict=True)
    torch.testing.assert_close(product(x)[0], delta(x)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_two_reflections_rotate() -> None:
    """What the product is for: beta = 2 and two keys turn the memory of a token by twice the angle between them,
    which no single step of the delta rule can."""
    from intarsia.ops import gated_delta_rule

    angle = torch.tensor(0.4, dtype=torch.float64)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = torch.stack([angle.cos(), angle.sin()])
    k = torch.stack([first, second] * 5).view(1, 10, 1, 2)
    start = torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2)
    _, state = gated_delta_rule(
        k,
        k,
        torch.zeros_like(k),
        None,
        k.new_full((1, 10, 1), 2),
        initial_state=start,
        output_final_state=True,
    )
    turn = 10 * angle
    expected = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).view(2, 2)
    torch.testing.assert_close(state[0, 0], expected, rtol=1e-9, atol=1e-9)


def test_impossible_options_are_named() -> None:
    with pytest.raises(ConfigError, match="steps must be positive"):
        DeltaProductConfig(2, 8, steps=0)
    with pytest.raises(ConfigError, match="conv_size=None"):
        DeltaNetConfig(2, 8, feature_map="elu")
    with pytest.raises(ConfigError, match="feature_map"):
        DeltaNetConfig(2, 8, feature_map="relu")  # type: ignore[arg-type]
