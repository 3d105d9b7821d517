"""Mamba, Mamba-2, Lightning Attention, Longhorn and the gated convolution against independent implementations with the
same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers import selective_scan
from intarsia.mixers import Mixer
from intarsia.mixers.gated_convolution import GatedConvolutionConfig
from intarsia.mixers.lightning import LightningConfig
from intarsia.mixers.longhorn import LonghornConfig
from intarsia.mixers.mamba import MambaConfig
from intarsia.mixers.mamba2 import Mamba2Config
from intarsia.ops import Sequences

D, T = 32, 150


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
        if "norm" in name:
            parameter.data += 1
        parameter.requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, T, D, generator=generator, dtype=torch.float64).to(dtype)


def load(mixer: Mixer, weights: dict[str, Tensor]) -> Mixer:
    mixer.load_state_dict(weights, strict=True)
    return mixer


def close(got: Tensor, expected: Tensor) -> None:
    # Both work in float32 and round differently: a few roundings of the largest value.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item() * 8)


@pytest.mark.parametrize("limits", [(0.0, None), (0.3, 0.9)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_transformers(groups: int, limits: tuple[float, float | None]) -> None:
    pytest.importorskip("transformers")
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    HV, V, K = 4, 16, 12
    config = TheirConfig(
        hidden_size=D, num_heads=HV, head_dim=V, state_size=K, n_groups=groups, num_hidden_layers=2,
        time_step_limit=(limits[0], float("inf") if limits[1] is None else limits[1]), chunk_size=32,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0).eval()
    randomise(theirs)
    w = theirs.state_dict()
    inner, keys = HV * V, groups * K
    z, x, k, q, dt = w["in_proj.weight"].split([inner, inner, keys, keys, HV])
    ours = load(
        Mamba2Config(HV, V, K, groups, dt_min=limits[0], dt_max=limits[1]).build(
            D, config.layer_norm_epsilon
        ),
        {
            "output_gate_proj.weight": z,
            "v_proj.weight": x,
            "k_proj.weight": k,
            "q_proj.weight": q,
            "dt_proj.weight": dt,
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "conv.bias": w["conv1d.bias"],
            **{f"decay.{name}": w[name] for name in ("A_log", "dt_bias", "D")},
            "norm.weight": w["norm.weight"],
            "o_proj.weight": w["out_proj.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_convolution_equals_transformers_lfm2(bias: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=D, num_hidden_layers=1, layer_types=["conv"], conv_bias=bias, conv_L_cache=4
    )
    theirs = Lfm2ShortConv(config, 0).eval()
    randomise(theirs)
    w = theirs.state_dict()
    weights = {"conv.weight": w["conv.weight"].squeeze(1)}
    for kind in ("weight", "bias") if bias else ("weight",):
        b, c, v = w[f"in_proj.{kind}"].chunk(3)
        weights |= {f"input_gate_proj.{kind}": b, f"output_gate_proj.{kind}": c, f"v_proj.{kind}": v}
        weights[f"o_proj.{kind}"] = w[f"out_proj.{kind}"]
    if bias:
        weights["conv.bias"] = w["conv.bias"]
    ours = load(GatedConvolutionConfig(conv_size=4, bias=bias).build(D), weights)
    close(ours(inputs())[0], theirs(inputs()))


@pytest.mark.parametrize("size", [1, 3])
def test_the_gated_convolution_equals_its_equation(size: int) -> None:
    """Written out tap by tap, in float64."""
    mixer = GatedConvolutionConfig(conv_size=size).build(D).double()
    randomise(mixer)
    x, w = inputs(torch.float64), dict(mixer.named_parameters())
    b, c, v = (x @ w[f"{name}.weight"].T for name in ("input_gate_proj", "output_gate_proj", "v_proj"))
    h = torch.zeros_like(x)
    for t in range(T):
        for i in range(min(size, t + 1)):
            h[:, t] += w["conv.weight"][:, size - 1 - i] * (b * v)[:, t - i]
    torch.testing.assert_close(mixer(x)[0], (c * h) @ w["o_proj.weight"].T, rtol=1e-11, atol=1e-11)


def test_mamba_equals_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import MambaConfig as TheirConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    K, rank = 6, 3
    config = TheirConfig(hidden_size=D, state_size=K, time_step_rank=rank, num_hidden_layers=2)
    theirs = MambaMixer(config, 0).eval()
    randomise(theirs)
    w = theirs.state_dict()
    x, z = w["in_proj.weight"].chunk(2)
    dt, k, q = w["x_proj.weight"].split([rank, K, K])
    ours = load(
        MambaConfig(state_dim=K, dt_rank=rank).build(D),
        {
            "v_proj.weight": x,
            "output_gate_proj.weight": z,
            "k_proj.weight": k,
            "q_proj.weight": q,
            "dt_proj.0.weight": dt,
            "dt_proj.1.weight": w["dt_proj.weight"],
            "decay.dt_bias": w["dt_proj.bias"],
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "conv.bias": w["conv1d.bias"],
            "decay.A_log": w["A_log"],
            "decay.D": w["D"],
            "o_proj.weight": w["out_proj.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_lightning_equals_transformers_minimax(layer: int) -> None:
    pytest.importorskip("transformers")
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    H, K = 3, 8
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=H, head_dim=K, num_hidden_layers=5, block_size=32
    )
    theirs = MiniMaxLightningAttention(config, layer)
    randomise(theirs)
    w = theirs.state_dict()
    # Their projection holds, for each head in turn, its q, k and v.
    q, k, v = w["qkv_proj.weight"].view(H, 3, K, D).unbind(1)
    ours = load(
        LightningConfig(H, K).at_layer(layer, 5).build(D, theirs.norm.variance_epsilon),
        {
            **{f"{n}_proj.weight": x.reshape(-1, D) for n, x in zip("qkv", (q, k, v), strict=True)},
            "output_gate_proj.weight": w["output_gate.weight"],
            "norm.weight": w["norm.weight"],
            "o_proj.weight": w["out_proj.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs(), None, None)[0])


def test_a_decay_factor_that_is_given_holds_in_every_layer() -> None:
    config = LightningConfig(2, 8, decay_factor=0.25)
    assert config.at_layer(3, 5) == config
    by_layer = [LightningConfig(2, 8).at_layer(layer, 5).decay_factor for layer in range(5)]
    assert by_layer == sorted(by_layer, reverse=True)
    assert by_layer[0] == pytest.approx(1, abs=1e-4)
    assert by_layer[-1] == pytest.approx(0, abs=1e-4)


def longhorn(w: dict[str, Tensor], u: Tensor, size: int) -> Tensor:
    """Longhorn's step of one token after another, from its weights: the paper's recurrence in a Mamba block."""
    B, tokens, _ = u.shape
    inner, N = w["decay.D"].shape[0], w["k_proj.weight"].shape[0]
    S, past, outputs = torch.zeros(B, inner, N, dtype=u.dtype), [], []
    for t in range(tokens):
        past.append(u[:, t] @ w["v_proj.weight"].T)
        x = w["conv.bias"] + sum(
            w["conv.weight"][:, size - 1 - age] * past[t - age] for age in range(min(size, t + 1))
        )
        x = x * torch.sigmoid(x)
        k, q = x @ w["k_proj.weight"].T, x @ w["q_proj.weight"].T
        step = x @ w["dt_proj.0.weight"].T @ w["dt_proj.1.weight"].T + w["decay.dt_bias"]
        beta = torch.sigmoid(step)
        delta = beta / (1 + beta * (k * k).sum(-1, keepdim=True))
        erased = torch.einsum("bd,bn->bdn", delta, k**2)
        S = (1 - erased) * S + torch.einsum("bd,bn->bdn", delta * x, k)
        o = torch.einsum("bdn,bn->bd", S, q) + w["decay.D"] * x
        z = u[:, t] @ w["output_gate_proj.weight"].T
        outputs.append((o * z * torch.sigmoid(z)) @ w["o_proj.weight"].T)
    return torch.stack(outputs, dim=1)


def test_longhorn_equals_its_recurrence() -> None:
    ours = LonghornConfig(state_dim=6, dt_rank=3).build(D)
    randomise(ours)
    ours = ours.double()
    x = inputs(torch.float64)
    torch.testing.assert_close(ours(x)[0], longhorn(ours.state_dict(), x, 4), rtol=1e-9, atol=1e-9)


def test_longhorn_survives_a_key_that_erases_all() -> None:
    """Where `Delta k²` rounds to one, the log-decay and its gradient must stay finite."""
    mixer = LonghornConfig(state_dim=1).build(D)
    randomise(mixer)
    mixer.k_proj.weight.data *= 1e6
    x = inputs().requires_grad_()
    y = mixer(x)[0]
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("config", [MambaConfig(), LonghornConfig()], ids=lambda config: config.type)
@pytest.mark.parametrize("lengths", [None, (300,), (64, 100, 28, 1, 107), (130, 170)], ids=str)
def test_long_texts_in_segments_are_the_same(
    config: MambaConfig | LonghornConfig, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients, batched and packed, with a state and without, whole and in segments."""
    mixer = dataclasses.replace(config, state_dim=3).build(8).double()
    randomise(mixer)
    x = torch.randn(1 if lengths else 2, 300, 8, generator=torch.Generator().manual_seed(2)).double()
    seqs = None if lengths is None else Sequences(lengths)
    parameters = dict(mixer.named_parameters())
    results = []
    for elements in (1 << 24, 1):
        monkeypatch.setitem(selective_scan.SEGMENT_ELEMENTS, "cpu", elements)
        fresh = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        # The parameters of the call are other tensors than the module's when the backward pass comes.
        u = x.clone().requires_grad_()
        y, _ = torch.func.functional_call(mixer, fresh, (u, None, seqs))
        (y * torch.linspace(-1, 1, 300, dtype=y.dtype)[:, None]).sum().backward()
        result = [y, u.grad, *(p.grad for p in fresh.values())]
        if seqs is None:
            with torch.no_grad():
                cached, state = mixer(x, mixer.init_state(2))
            result += [cached, state.board]
        results.append(result)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_convolution_with_a_bias_is_torchs() -> None:
    from intarsia.layers.convolution import ShortConvolution

    conv = ShortConvolution(6, 4, bias=True)
    randomise(conv)
    x = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(3))
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), conv.weight[:, None], conv.bias, groups=6)).mT
    close(conv(x, None, None)[0], expected)
    assert "bias" not in ShortConvolution(6, 4).state_dict()
