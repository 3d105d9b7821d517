"""The functions of flash-linear-attention that are used, as loops over tokens that keep to its signatures and
conventions: a stand-in where its kernels cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.fla_signatures import READ_FROM_KWARGS, SIGNATURES


class StandIn(Mapping[str, Callable[..., tuple[Tensor, Tensor | None]]]):
    """By name, as `intarsia.ops.linear_fla.functions()`; `calls` holds the name and arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getitem__(self, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
        return functools.partial(self._run, name)

    def __iter__(self) -> Iterator[str]:
        return iter(SIGNATURES)

    def __len__(self) -> int:
        return len(SIGNATURES)

    def _run(self, name: str, **x: Any) -> tuple[Tensor, Tensor | None]:
        self.calls.append((name, x))
        known = {parameter for parameter in SIGNATURES[name] if not parameter.startswith("*")}
        assert set(x) <= known | READ_FROM_KWARGS.get(name, set()), set(x) - known
        _check(name, x)
        q, k, v = (x[n].double() for n in "qkv")
        if x.get("use_qk_l2norm_in_kernel"):
            q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        group = v.shape[2] // q.shape[2]
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
        parts = _Parts(q, k, v, *_decay_and_strength(name, x), x.get("a"), x.get("b"))
        edges = x.get("cu_seqlens")
        state = x["initial_state"]
        if edges is None:
            o, final = _loop(parts, None if state is None else state.double())
        else:
            spans = zip(edges.tolist()[:-1], edges.tolist()[1:], strict=True)
            found = [
                _loop(parts.of(slice(*span)), None if state is None else state[n : n + 1].double())
                for n, span in enumerate(spans)
            ]
            o, final = torch.cat([o for o, _ in found], 1), torch.cat([final for _, final in found])
        return (x["scale"] * o).to(x["v"].dtype), final.float() if x["output_final_state"] else None


class _Parts:
    """`g` `[B, T, HV, 1 or K]`, `beta` `[B, T, HV]`, or None; `a` and `b` as flash-linear-attention has them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Any, a: Any, b: Any) -> None:
        self.all = (q, k, v, g, beta, *(None if y is None else y.double() for y in (a, b)))

    def of(self, span: slice) -> _Parts:
        return _Parts(*(None if y is None else y[:, span] for y in self.all))  # type: ignore[arg-type]


def _loop(parts: _Parts, S: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, a, b = parts.all
    if S is None:
        S = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        before, write = S, v[:, t]
        S = S * g[:, t].exp()[..., None]
        if beta is not None:
            write = beta[:, t][..., None] * (write - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        if a is not None:
            S = S + b[:, t][..., None] * torch.einsum("bhkv,bhk->bhv", before, a[:, t])[..., None, :]
        S = S + k[:, t][..., None] * write[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S


def _decay_and_strength(name: str, x: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    v = x["v"]
    B, T, HV, K = *v.shape[:3], x["q"].shape[3]
    g = x.get("g") if x.get("g") is not None else x.get("gk")
    if x.get("g_gamma") is not None:
        g = x["g_gamma"].expand(B, T, HV)
    g = torch.zeros(B, T, HV) if g is None else g
    g = g.double() if g.dim() == 4 else g.double()[..., None]
    if x.get("use_gate_in_kernel"):
        rate = x["A_log"].double().exp()[:, None]
        raw = g if x["dt_bias"] is None else g + x["dt_bias"].double().view(HV, -1)
        bound = x.get("lower_bound")
        g = -rate * F.softplus(raw) if bound is None else bound * torch.sigmoid(rate * raw)
    assert g.shape in ((B, T, HV, K), (B, T, HV, 1))
    beta = x.get("beta")
    if beta is not None:
        beta = beta.double()
        if x.get("use_beta_sigmoid_in_kernel"):
            beta = (2 if x["allow_neg_eigval"] else 1) * torch.sigmoid(beta)
    return g, beta


def _check(name: str, x: dict[str, Any]) -> None:
    """What flash-linear-attention itself asserts, or reads without asking."""
    q, k, v = x["q"], x["k"], x["v"]
    B, T, H, K = q.shape
    HV = v.shape[2]
    shares = "kda" in name or "gated_delta_rule" in name
    assert q.dtype == k.dtype == v.dtype
    assert K <= 256
    assert HV % H == 0 if shares else HV == H
    assert x.get("allow_neg_eigval", False) is False or x["use_beta_sigmoid_in_kernel"]
    by_channel = {"chunk_kda": "g", "fused_recurrent_kda": "g", "chunk_gla": "g", "fused_recurrent_gla": "gk"}
    if "dplr" in name:
        assert x["gk"].shape == x["a"].shape == x["b"].shape == k.shape
        assert x["a"].dtype == x["b"].dtype == q.dtype
    elif name in by_channel:
        assert x[by_channel[name]].shape == (B, T, HV, K)
    elif x.get("g") is not None:
        assert x["g"].shape == (B, T, HV)
    else:
        assert "simple_gla" in name
        assert x.get("g_gamma") is None or x["g_gamma"].shape == (HV,)
    if x.get("lower_bound") is not None:
        assert name == "fused_recurrent_kda" or (x["safe_gate"] and -5 <= x["lower_bound"] < 0)
    if x.get("use_gate_in_kernel"):
        assert x["A_log"].shape == (HV,)
        assert x["dt_bias"] is None or x["dt_bias"].shape == ((HV * K,) if "kda" in name else (HV,))
    if ("delta_rule" in name and "dplr" not in name) or "kda" in name:
        assert x["beta"].shape == (B, T, HV)
    sequences = B
    if (edges := x.get("cu_seqlens")) is not None:
        assert B == 1
        assert edges.dtype == torch.int64
        assert (edges.diff() > 0).all()
        assert int(edges[-1]) == T
        sequences = len(edges) - 1
    state = x["initial_state"]
    assert state is None or (state.dtype == torch.float32 and state.shape == (sequences, HV, K, v.shape[3]))
