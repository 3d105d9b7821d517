"""flash-linear-attention's rules beyond the delta rule, each against its own recurrence, written for these tests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.integrations import fla
from support.budget import assert_within_budget
from support.fla_loops import HV, B, H, K, T, V, close, loop, tensors

Step = Callable[[Tensor, dict[str, Tensor], int], Tensor]
Inputs = dict[str, Tensor]


def inputs(heads: int = H) -> Inputs:
    """What all of the rules take, with as many value heads; `a` and `b` shrink what they read."""
    x = tensors(heads)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit = F.normalize(normal(B, T, H, K), dim=-1)
    x |= {
        "a": -unit, "b": unit * torch.sigmoid(normal(B, T, H, K)), "p": F.normalize(normal(B, T, H, K), dim=-1),
        "erase": torch.sigmoid(normal(B, T, heads, K)), "write": torch.sigmoid(normal(B, T, heads, V)),
    }  # fmt: skip
    return x


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def read(S: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhkv,bhk->bhv", S, k)


def shared(x: Tensor, heads: int) -> Tensor:
    """A key head's vectors for each of its value heads, `[B, heads, K]` of one token."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def dplr(S: Tensor, x: Inputs, t: int) -> Tensor:
    read_before = read(S, x["a"][:, t])
    return (
        S * x["gk"][:, t].exp()[..., None]
        + outer(x["b"][:, t], read_before)
        + outer(x["k"][:, t], x["v"][:, t])
    )


def iplr(S: Tensor, x: Inputs, t: int) -> Tensor:
    return S + outer(x["b"][:, t], read(S, x["a"][:, t])) + outer(x["k"][:, t], x["v"][:, t])


def multiplied(S: Tensor, x: Inputs, t: int) -> Tensor:
    kk, a = x["a"][:, t], x["b"][:, t]
    return S * x["gk"][:, t].exp()[..., None] - outer(kk * a, read(S, kk)) + outer(x["k"][:, t], x["v"][:, t])


def comba(S: Tensor, x: Inputs, t: int) -> Tensor:
    k, p = (shared(x[name][:, t], S.shape[1]) for name in ("k", "p"))
    written = x["beta"][:, t, :, None] * (x["v"][:, t] - read(S, p))
    return S * x["g"][:, t].exp()[..., None, None] + outer(k, written)


def gdn2(S: Tensor, x: Inputs, t: int) -> Tensor:
    k = shared(x["k"][:, t], S.shape[1])
    S = S * x["gk"][:, t].exp()[..., None]
    return S + outer(k, x["write"][:, t] * x["v"][:, t] - read(S, x["erase"][:, t] * k))


def run_steps(step: Step, x: Inputs, scale: float, state: Tensor | None) -> tuple[Tensor, Tensor]:
    S = torch.zeros_like(x["state"]) if state is None else state
    outputs = []
    for t in range(x["q"].shape[1]):
        S = step(S, x, t)
        outputs.append(scale * read(S, shared(x["q"][:, t], S.shape[1])))
    return torch.stack(outputs, 1), S


# By name: the recurrence, the names of the arguments in order, and the scale where none is given.
RULES: dict[str, tuple[Step, tuple[str, ...], float]] = {
    "chunk_dplr_delta_rule": (dplr, ("q", "k", "v", "a", "b", "gk"), K**-0.5),
    "fused_recurrent_dplr_delta_rule": (dplr, ("q", "k", "v", "a", "b", "gk"), K**-0.5),
    "chunk_iplr_delta_rule": (iplr, ("q", "k", "v", "a", "b"), K**-0.5),
    "fused_recurrent_iplr_delta_rule": (iplr, ("q", "k", "v", "a", "b"), K**-0.5),
    "chunk_rwkv7": (dplr, ("q", "gk", "k", "v", "a", "b"), 1.0),
    "fused_recurrent_rwkv7": (dplr, ("q", "gk", "k", "v", "a", "b"), K**-0.5),
    "fused_mul_recurrent_rwkv7": (multiplied, ("q", "gk", "k", "v", "a", "b"), 1.0),
    "chunk_comba": (comba, ("q", "k", "v", "p", "g", "beta"), K**-0.5),
    "fused_recurrent_comba": (comba, ("q", "k", "p", "v", "g", "beta"), K**-0.5),
    "chunk_gdn2": (gdn2, ("q", "k", "v", "gk", "erase", "write"), K**-0.5),
    "fused_recurrent_gdn2": (gdn2, ("q", "k", "v", "gk", "erase", "write"), K**-0.5),
}
REVERSIBLE = ("fused_recurrent_dplr_delta_rule", "fused_mul_recurrent_rwkv7")


def case(name: str) -> tuple[Callable[..., Any], Inputs, list[Tensor], Step, float]:
    step, order, scale = RULES[name]
    x = inputs(HV if step in (comba, gdn2) else H)
    return getattr(fla, name), x, [x[n] for n in order], step, scale


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_each_rule_equals_its_recurrence(name: str, scale: float | None) -> None:
    f, x, args, step, default = case(name)
    given = {} if scale is None else {"scale": scale}
    o, state = f(*args, initial_state=x["state"], output_final_state=True, **given)
    expected, final = run_steps(step, x, default if scale is None else scale, x["state"])
    close(o, expected)
    close(state, final)
    o, state = f(*args, output_final_state=False, **given)
    assert state is None
    close(o, run_steps(step, x, default if scale is None else scale, None)[0])


@pytest.mark.parametrize("name", RULES)
def test_packed_sequences_are_apart(name: str) -> None:
    f, x, args, _, _ = case(name)
    args, edges = [y[:1] for y in args], [0, 5, 20, T]
    states = torch.cat([x["state"], 2 * x["state"][:1]])
    reverse = {"reverse": True} if name in REVERSIBLE else {}
    for option in ({}, reverse):
        o, final = f(
            *args, initial_state=states, output_final_state=True, cu_seqlens=torch.tensor(edges), **option
        )
        for i, (start, end) in enumerate(pairwise(edges)):
            part, state = f(
                *(y[:, start:end] for y in args), initial_state=states[i : i + 1], output_final_state=True, **option
            )  # fmt: skip
            close(o[:, start:end], part)
            close(final[i : i + 1], state)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reverse_runs_from_the_end(name: str) -> None:
    f, x, args, step, scale = case(name)
    o, state = f(*args, initial_state=x["state"], output_final_state=True, reverse=True)
    back = {n: y if n == "state" else y.flip(1) for n, y in x.items()}
    expected, final = run_steps(step, back, scale, x["state"])
    close(o, expected.flip(1))
    close(state, final)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_keep_the_budget(name: str, dtype: torch.dtype) -> None:
    f, x, _, step, scale = case(name)
    order = RULES[name][1]

    def ours(**given: Tensor) -> tuple[Tensor, Tensor]:
        o, state = f(*(given[n] for n in order), output_final_state=True)
        return o, state

    def exact(**given: Tensor) -> tuple[Tensor, Tensor]:
        return run_steps(step, {**given, "state": x["state"]}, scale, None)

    assert_within_budget(
        ours, exact, {n: x[n] for n in order}, dtype, float32=frozenset({"g", "gk", "beta", "a", "b"})
    )


@pytest.mark.parametrize("name", RULES)
def test_gradients_flow_to_every_argument(name: str) -> None:
    f, _, args, _, _ = case(name)
    args = [y[:1, :5].clone().requires_grad_() for y in args]
    assert torch.autograd.gradcheck(lambda *given: f(*given)[0], args, fast_mode=True)


@pytest.mark.parametrize("f", [fla.chunk_gdn2, fla.fused_recurrent_gdn2])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gated_deltanet_2_makes_its_gate_and_its_lengths(
    f: Callable[..., Any], lower_bound: float | None
) -> None:
    x = inputs(HV)
    A_log, dt_bias = torch.linspace(-1, 1, HV).double(), torch.linspace(-1, 1, HV * K).double()
    raw, long = 2 * x["gk"] + 1, 3 * x["k"]
    o, _ = f(
        x["q"], long, x["v"], raw, x["erase"], x["write"], use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
    )  # fmt: skip
    g = fla.fused_kda_gate(raw, A_log, dt_bias, lower_bound, torch.float64)

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    close(o, run_steps(gdn2, {**x, "q": unit(x["q"]), "k": unit(long), "gk": g}, K**-0.5, None)[0])


def test_gated_deltanet_2_with_one_strength_is_kda() -> None:
    x = inputs(HV)
    same = x["beta"][..., None]
    o, state = fla.chunk_gdn2(
        x["q"], x["k"], x["v"], x["gk"], same.expand_as(x["erase"]), same.expand_as(x["write"]), output_final_state=True
    )  # fmt: skip
    expected, final = fla.chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"], output_final_state=True)
    close(o, expected)
    close(state, final)


@pytest.mark.parametrize("f", [fla.chunk_gdn2, fla.fused_recurrent_gdn2])
def test_states_with_the_values_first(f: Callable[..., Any]) -> None:
    x = inputs(HV)
    args = [x[n] for n in RULES["chunk_gdn2"][1]]
    o, state = f(*args, initial_state=x["state"], output_final_state=True)
    turned = f(*args, initial_state=x["state"].mT, output_final_state=True, state_v_first=True)
    close(turned[0], o)
    close(turned[1], state.mT)


def test_comba_divides_three_vectors_by_their_lengths_and_has_defaults() -> None:
    x = inputs(HV)
    q, k, p = 2 * x["q"], 3 * x["k"], 4 * x["p"]

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    o, _ = fla.chunk_comba(q, k, x["v"], p, x["g"], x["beta"], use_qk_l2norm_in_kernel=True)
    close(o, run_steps(comba, {**x, "q": unit(q), "k": unit(k), "p": unit(p)}, K**-0.5, None)[0])
    o, _ = fla.fused_recurrent_comba(x["q"], x["k"], None, x["v"], x["g"])
    plain = {**x, "p": x["k"], "beta": torch.ones_like(x["beta"])}
    close(o, run_steps(comba, plain, K**-0.5, None)[0])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_delta_product_takes_several_steps_a_token(gated: bool, steps: int) -> None:
    x = tensors(H)
    generator = torch.Generator().manual_seed(2)
    k = F.normalize(torch.randn(B, T * steps, H, K, generator=generator, dtype=torch.float64), dim=-1)
    v = torch.randn(B, T * steps, H, V, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(B, T * steps, H, generator=generator, dtype=torch.float64)
    S, outputs = x["state"], []
    for t in range(T):
        S = S * x["g"][:, t].exp()[..., None, None] if gated else S
        for i in range(t * steps, (t + 1) * steps):
            S = loop(k[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], None, beta[:, i : i + 1], S, 1.0)[1]
        outputs.append(0.5 * read(S, x["q"][:, t]))
    options: dict[str, Any] = {"num_householder": steps, "scale": 0.5, "output_final_state": True}
    g = x["g"] if gated else None
    o, state = fla.chunk_gated_delta_product(x["q"], k, v, g, beta, initial_state=x["state"], **options)
    close(o, torch.stack(outputs, 1))
    close(state, S)
    row = [y if y is None else y.flatten(0, 1)[None] for y in (x["q"], k, v, g, beta)]
    packed, states = fla.chunk_gated_delta_product(
        *row, initial_state=x["state"], cu_seqlens=torch.tensor([0, T, 2 * T]), **options
    )
    close(packed.view_as(o), o)
    close(states, state)


@pytest.mark.parametrize("f", [fla.chunk_hgrn, fla.fused_recurrent_hgrn])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hgrn_sums_each_channel(f: Callable[..., Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, g, start = (torch.randn(*shape, generator=generator) for shape in ((B, T, 7), (B, T, 7), (B, 7)))
    x, g, start = x.to(dtype), -F.softplus(g).to(dtype), start.to(dtype)
    h, outputs = start.double(), []
    for t in range(T):
        h = g[:, t].double().exp() * h + x[:, t].double()
        outputs.append(h)
    o, state = f(x, g, start, True)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 2**-8}
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), torch.stack(outputs, 1), **tolerance)
    torch.testing.assert_close(state.double(), h, rtol=1e-5, atol=1e-5)
    assert f(x, g)[1] is None


def test_hgrn_keeps_packed_sequences_apart() -> None:
    x, g = torch.randn(2, 1, T, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    g, start = -g.square(), torch.ones(2, 3, dtype=torch.float64)
    o, state = fla.fused_recurrent_hgrn(x, g, start, True, torch.tensor([0, 9, T]))
    first, one = fla.fused_recurrent_hgrn(x[:, :9], g[:, :9], start[:1], True)
    second, two = fla.fused_recurrent_hgrn(x[:, 9:], g[:, 9:], start[1:], True)
    close(o, torch.cat([first, second], 1))
    close(state, torch.cat([one, two]))


X = inputs()
WIDE = inputs(HV)
REFUSALS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (fla.chunk_dplr_delta_rule, (), {"lower_bound": 1.0}, ConfigError, "lower_bound"),
    (fla.chunk_dplr_delta_rule, (), {"cp_context": object()}, UnsupportedError, "initial_state"),
    (fla.chunk_dplr_delta_rule, (), {"gk": X["g"]}, ShapeError, "each channel"),
    (fla.chunk_iplr_delta_rule, (), {"chunk_size": 24}, ConfigError, "power of 2"),
    (fla.chunk_iplr_delta_rule, (), {"head_first": True}, UnsupportedError, "sequence first"),
    (fla.chunk_rwkv7, (), {"cu_seqlens": torch.tensor([0, T])}, ShapeError, "B == 1"),
    (fla.chunk_comba, (), {"beta": WIDE["v"]}, UnsupportedError, "each channel"),
    (fla.chunk_comba, (), {"p": X["p"][:, :-1]}, ShapeError, "p must"),
    (fla.chunk_comba, (), {"g": WIDE["gk"]}, ShapeError, "each head"),
    (fla.chunk_gdn2, (), {"chunk_size": 32}, ConfigError, "64"),
    (fla.chunk_gdn2, (), {"w": WIDE["v"][..., :1]}, ShapeError, "w must"),
    (fla.chunk_gdn2, (), {"return_intermediate_states": True}, UnsupportedError, "output_final_state"),
    (fla.chunk_gdn2, (), {"use_gate_in_kernel": True}, ConfigError, "A_log"),
    (fla.chunk_gdn2, (), {"use_gate_in_kernel": True, "safe_gate": True}, ConfigError, "lower_bound"),
]


@pytest.mark.parametrize(("f", "_", "options", "error", "message"), REFUSALS)
def test_what_cannot_be_served_says_so(
    f: Callable[..., Any], _: object, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = f.__name__
    x = WIDE if RULES[name][0] in (comba, gdn2) else X
    names = {"chunk_gdn2": ("q", "k", "v", "g", "b", "w"), "chunk_rwkv7": ("r", "w", "k", "v", "a", "b")}
    arguments = dict(zip(names.get(name, RULES[name][1]), (x[n] for n in RULES[name][1]), strict=True))
    with pytest.raises(error, match=message):
        f(**{**arguments, **options})


def test_delta_product_says_what_does_not_fit() -> None:
    x = tensors(H)
    with pytest.raises(ShapeError, match=r"T \* num_householder"):
        fla.chunk_gated_delta_product(x["q"], x["k"], x["v"], None, x["beta"], num_householder=2)
    with pytest.raises(ShapeError, match="initial_state"):
        fla.fused_recurrent_hgrn(x["g"], x["g"], torch.zeros(1, 1))
    with pytest.raises(ShapeError, match=r"B, T, D"):
        fla.chunk_hgrn(x["g"], x["gk"])
