"""RWKV-7, its channel mixing and Comba against their papers' recurrences, written out token by token in float64.

Nothing here calls the operators or the layers' parts: from the weights alone, by loops and small products. The states
are `[V, K]`, as the papers have them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.mixers import Mixer
from intarsia.mixers.base import HandedOn
from intarsia.mixers.channel_mixing import ChannelMixingConfig
from intarsia.mixers.comba import CombaConfig
from intarsia.mixers.rwkv7 import RWKV7Config
from support.oracles import inputs, layer, sigmoid

D, T, EPS = 20, 41, 1e-5


def rwkv7(w: dict[str, Tensor], x: Tensor, config: RWKV7Config) -> Tensor:
    """Peng et al. 2025, section 4.1: one sequence `[T, D]`, one head after the other, row vectors."""
    H, K, V = config.num_heads, config.head_dim, config.value_dim
    y = x.new_zeros(T, H * V)
    for h in range(H):
        keys, values = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
        wkv = x.new_zeros(V, K)
        for t in range(T):
            earlier = x[t - 1] if t else torch.zeros_like(x[0])
            x_r, x_d, x_k, x_v, x_a, x_g = (x[t] + (earlier - x[t]) * mu for mu in w["shift"])
            r = w["r_proj.weight"][keys] @ x_r
            k = w["k_proj.weight"][keys] @ x_k
            v = w["v_proj.weight"][values] @ x_v
            d = w["decay_proj.2.weight"][keys] @ torch.tanh(w["decay_proj.0.weight"] @ x_d)
            decay = torch.exp(-math.exp(-0.5) * sigmoid(d + w["decay.bias"][keys]))
            rate = w["rate_proj.2.weight"][keys] @ (w["rate_proj.0.weight"] @ x_a) + w["rate_bias"][keys]
            rate = sigmoid(rate)
            removal = k * w["removal"][h]
            removal = removal / math.sqrt(float(removal @ removal))
            alpha = w["replacement"][h]
            replacement = k * ((1 - alpha) + alpha * rate)
            transition = torch.diag(decay) - torch.outer(removal, rate * removal)
            wkv = wkv @ transition + torch.outer(v, replacement)
            p = wkv @ r
            centred = p - p.mean()
            p = centred / torch.sqrt((centred * centred).mean() + K * EPS)
            p = p * w["norm.weight"][values] + w["norm.bias"][values]
            p = p + (r @ (w["bonus"][h] * replacement)) * v
            gate = w["output_gate_proj.2.weight"][values] @ sigmoid(w["output_gate_proj.0.weight"] @ x_g)
            y[t, values] = gate * p
    return y @ w["o_proj.weight"].T


def channel_mixing(w: dict[str, Tensor], x: Tensor, config: ChannelMixingConfig) -> Tensor:
    """Peng et al. 2025, section 4.2: one sequence `[T, D]`."""
    earlier = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    shift = w["shift"] if config.shift else 0
    hidden = (x + (earlier - x) * shift) @ w["k_proj.weight"].T
    return (hidden * hidden * (hidden > 0)) @ w["o_proj.weight"].T


def comba(w: dict[str, Tensor], x: Tensor, config: CombaConfig) -> Tensor:
    """Hu et al. 2025: one sequence `[T, D]`."""
    H, K, HV, V = config.num_heads, config.head_dim, config.value_heads, config.value_dim
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    if "conv.weight" in w:
        together = torch.cat([q, k, v], dim=1)
        kernel = w["conv.weight"]
        size = kernel.shape[1]
        padded = torch.cat([x.new_zeros(size - 1, together.shape[1]), together])
        mixed = torch.stack([(padded[t : t + size] * kernel.T).sum(0) for t in range(T)])
        q, k, v = (mixed * sigmoid(mixed)).split([H * K, H * K, HV * V], dim=1)
    o = x.new_zeros(T, HV, V)
    for hv in range(HV):
        h = hv // (HV // H)
        state = x.new_zeros(V, K)
        for t in range(T):
            query, key = q[t, h * K : (h + 1) * K], k[t, h * K : (h + 1) * K]
            query, key = (z / torch.sqrt(z @ z + 1e-6) for z in (query, key))
            beta = sigmoid(w["beta_proj.weight"][hv] @ x[t])
            step = torch.log(1 + torch.exp(w["decay_proj.weight"][hv] @ x[t] + w["decay.dt_bias"][hv]))
            alpha = torch.exp(-torch.exp(w["decay.A_log"][hv]) * step)
            feedback = beta * sigmoid(w["feedback"][h])
            state = state @ (alpha * torch.eye(K, dtype=x.dtype) - feedback * torch.outer(key, key))
            state = state + beta * torch.outer(v[t, hv * V : (hv + 1) * V], key)
            if "correction" in w:
                query = query - w["correction"][h] * key
            o[t, hv] = state @ query / math.sqrt(K)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + EPS) * w["norm.weight"]
    if config.output_gate != "none":
        z = (x @ w["output_gate_proj.weight"].T).view(o.shape)
        o = o * sigmoid(z) * (z if config.output_gate == "swish" else 1)
    return o.flatten(1) @ w["o_proj.weight"].T


@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        (RWKV7Config(2, 8, decay_rank=5, rate_rank=6, gate_rank=7), rwkv7),
        (RWKV7Config(3, 6, 10, decay_rank=9, rate_rank=4, gate_rank=5), rwkv7),
        (RWKV7Config(2, 8, decay_rank=5, rate_rank=6, gate_rank=7, value_rank=3), rwkv7),
        (ChannelMixingConfig(28), channel_mixing),
        (ChannelMixingConfig(28, shift=False), channel_mixing),
        (CombaConfig(2, 8), comba),
        (CombaConfig(2, 8, 4, 6, output_gate="swish"), comba),
        (CombaConfig(3, 6, 3, 10, conv_size=None, correction=None, output_gate="none"), comba),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_layers_are_the_recurrences_of_their_papers(config: Any, oracle: Any) -> None:
    mixer, x = layer(config, D, EPS), inputs(T, D)
    weights = mixer.state_dict()
    expected = torch.stack([oracle(weights, sequence, config) for sequence in x])
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-9)


def test_rwkv7_mixes_its_values_with_those_of_the_first_layer() -> None:
    """The first passes its own on and needs none; a later one is a mixture, which its two ends show."""
    options: dict[str, Any] = {"decay_rank": 5, "rate_rank": 6, "gate_rank": 7, "value_rank": 3}
    first = layer(RWKV7Config(2, 8, 6, depth_fraction=0.0, **options), D, EPS)
    later = layer(RWKV7Config(2, 8, 6, depth_fraction=0.5, **options), D, EPS)
    assert first.hands_on
    assert later.hands_on
    assert first.value_mix_proj is None  # type: ignore[attr-defined]
    x = inputs(T, D)
    y, _, passed = first(x, None, None, HandedOn())
    assert torch.equal(y, first(x)[0])
    assert passed.values.shape == (x.shape[0], T, 2, 6)
    with pytest.raises(ConfigError, match="first layer"):
        later(x)
    weights = later.state_dict()
    share = weights["value_mix_bias"]
    with torch.no_grad():
        share.fill_(-1e9)
        unmixed = later(x, None, None, passed)[0]
        expected = torch.stack([rwkv7(weights, sequence, later.config) for sequence in x])  # type: ignore[arg-type]
        torch.testing.assert_close(unmixed, expected, rtol=1e-9, atol=1e-9)
        share.fill_(1e9)
        of_first, _, passed_on = later(x, None, None, passed)
        weights["v_proj.weight"].zero_()
        assert torch.equal(passed_on.values, passed.values)
        torch.testing.assert_close(later(x, None, None, passed)[0], of_first, rtol=1e-9, atol=1e-9)


def test_rwkv7_begins_as_the_authors_models_do() -> None:
    """Decays that spread from slow to fast over the channels, and shifts that shrink with the depth."""
    from intarsia.model.initialization import init_weights

    def fresh(layer: int) -> Mixer:
        mixer = RWKV7Config(2, 8, value_rank=4).at_layer(layer, 12).build(D)
        init_weights(mixer, 0, std=0.02, depth=12)
        return mixer

    first, last = fresh(0), fresh(11)
    bias = first.decay.bias.view(2, 8)
    # From -5.5 - 2.5 in the slowest channel to 0.5 + 2.5 in the fastest.
    torch.testing.assert_close(bias[0, 0], torch.tensor(-8.0))
    torch.testing.assert_close(bias[1, 7], torch.tensor(3.0))
    assert (bias.diff() > 0).all()
    assert (last.shift[:, 1:] < first.shift[:, 1:]).all()
    torch.testing.assert_close(last.value_mix_bias[[0, -1]], torch.tensor([0.93, 0.53]))
    assert 0 <= last.shift.min() <= first.shift.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RWKV7Config(2, 8, gate_rank=0), "gate_rank must be positive"),
        (lambda: RWKV7Config(2, 8, depth_fraction=1.0), "depth_fraction must be in"),
        (lambda: CombaConfig(2, 8, 3), "num_v_heads must be a multiple"),
        (lambda: CombaConfig(2, 8, output_gate="relu"), "output_gate must be"),
    ],
)
def test_options_that_cannot_be_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
