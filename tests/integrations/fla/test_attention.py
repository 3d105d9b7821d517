"""flash-linear-attention's softmax attention against sums over all pairs, written for these tests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.integrations import fla
from support.fla_loops import B, H, K, V, close

T, HQ = 150, 4
"""More tokens than a block of queries, and two query heads for a key head."""


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(B, T, HQ, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V),
        "g": -F.softplus(normal(B, T, HQ)), "w": F.normalize(normal(B, T, H, K), dim=-1),
        "beta": 2 * torch.sigmoid(normal(B, T, H)), "sinks": normal(HQ),
    }  # fmt: skip


def weigh(
    logits: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * logits + sum of g)` over the keys that a query sees, times v; logits `[B, HQ, T, T]`."""
    size = logits.shape[-1]
    logits = scale * logits
    if g is not None:
        for j in range(size):
            logits[..., j + 1 :, j] += g[:, j + 1 :].cumsum(1).transpose(1, 2)
    i, j = torch.arange(size)[:, None], torch.arange(size)
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    weights = logits.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bhts,bshv->bthv", weights / total, v.repeat_interleave(HQ // H, 2))


def products(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(HQ // H, 2))


def through_maps(q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`k_jᵀ H_{j+1} .. H_i q_i` for all pairs, and all keys as they look behind the last token."""
    k, w, beta = (x.repeat_interleave(HQ // H, 2) for x in (k, w, beta))
    logits = torch.zeros(q.shape[0], HQ, q.shape[1], q.shape[1], dtype=q.dtype)
    keys = torch.zeros_like(k)
    for i in range(q.shape[1]):
        along = torch.einsum("bshk,bhk->bsh", keys[:, :i], w[:, i]) * beta[:, None, i]
        keys[:, :i] = keys[:, :i] - along[..., None] * w[:, None, i]
        keys[:, i] = k[:, i]
        logits[:, :, i, : i + 1] = torch.einsum("bhk,bshk->bhs", q[:, i], keys[:, : i + 1])
    return logits, keys[:, :, :: HQ // H]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 140, 1000])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention(gated: bool, window: int | None, sinks: bool, scale: float | None) -> None:
    x = tensors()
    g, s = x["g"] if gated else None, x["sinks"] if sinks else None
    o = fla.parallel_attn(x["q"], x["k"], x["v"], g, scale, window, sink_bias=s)
    expected = weigh(products(x["q"], x["k"]), x["v"], K**-0.5 if scale is None else scale, g, window, s)
    close(o, expected)
    if gated and not sinks:
        close(fla.parallel_forgetting_attn(x["q"], x["k"], x["v"], x["g"], scale, window), expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_is_not_finite_reaches_no_earlier_token(gated: bool, window: int | None, sinks: bool) -> None:
    inputs = {name: x.float() for name, x in tensors().items()}
    options = {"window_size": window, "sink_bias": inputs["sinks"] if sinks else None}

    def attend(**changed: Tensor) -> Tensor:
        now = {**inputs, **changed}
        return fla.parallel_attn(now["q"], now["k"], now["v"], now["g"] if gated else None, **options)

    o = attend()
    for name in ("q", "k", "v", "g") if gated else ("q", "k", "v"):
        changed = inputs[name].clone()
        changed[:, 100] = torch.nan
        assert torch.equal(attend(**{name: changed})[:, :100], o[:, :100]), name


@pytest.mark.parametrize("gated", [False, True])
def test_path_attention(gated: bool) -> None:
    x = tensors()
    g = x["g"] if gated else None
    o, cache = fla.parallel_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"], g, scale=0.7, use_cache=True)
    logits, keys = through_maps(x["q"], x["k"], x["w"], x["beta"])
    # The decays are scaled with the logits there.
    close(o, weigh(logits, x["v"], 0.7, None if g is None else 0.7 * g))
    close(cache, keys)
    o, cache = fla.parallel_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"], g)
    close(o, weigh(logits, x["v"], K**-0.5, None if g is None else K**-0.5 * g))
    assert cache is None


@pytest.mark.parametrize("erased", [False, True])
def test_deltaformer(erased: bool) -> None:
    x = tensors()
    q, k, v = x["q"][:, :, :H], x["k"], x["v"]
    beta = x["beta"] if erased else None
    scores = K**-0.5 * torch.einsum("bthk,bshk->bhts", k, k)
    u = [v[:, 0]]
    for t in range(1, T):
        old = torch.einsum("bhs,bshv->bhv", scores[:, :, t, :t].softmax(-1), torch.stack(u, 1))
        u.append(v[:, t] - (old if beta is None else beta[:, t, :, None] * old))
    logits = K**-0.5 * torch.einsum("bthk,bshk->bhts", q, k)
    weights = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    close(fla.deltaformer_attn(q, k, v, beta), torch.einsum("bhts,bshv->bthv", weights, torch.stack(u, 1)))


def test_deltaformer_with_padding_on_the_right() -> None:
    x = tensors()
    q, k, v = x["q"][:, :, :H], x["k"], x["v"]
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 100:] = 0
    o = fla.deltaformer_attn(q, k, v, x["beta"], mask)
    whole = fla.deltaformer_attn(q, k, v, x["beta"])
    close(o[0], whole[0])
    close(o[1, :100], whole[1, :100])
    assert not o[1, 100:].any()
    assert not fla.deltaformer_attn(q, k, v, x["beta"], torch.zeros_like(mask)).any()


def calls() -> dict[str, Callable[..., Tensor]]:
    return {
        "attention": lambda x, **o: fla.parallel_attn(x["q"], x["k"], x["v"], **o),
        "sinks": lambda x, **o: fla.parallel_attn(x["q"], x["k"], x["v"], x["g"], sink_bias=x["sinks"], **o),
        "forgetting": lambda x, **o: fla.parallel_forgetting_attn(x["q"], x["k"], x["v"], x["g"], **o),
        "window": lambda x, **o: fla.parallel_forgetting_attn(x["q"], x["k"], x["v"], x["g"], window_size=9, **o),
        "path": lambda x, **o: fla.parallel_path_attn(x["q"], x["k"], x["v"], x["w"], x["beta"], x["g"], **o)[0],
        "path_keys": lambda x, **o: fla.parallel_path_attn(
            x["q"], x["k"], x["v"], x["w"], x["beta"], use_cache=True, **o
        )[1],
        "deltaformer": lambda x, **o: fla.deltaformer_attn(x["q"][:, :, :H], x["k"], x["v"], x["beta"], **o),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_packed_sequences_are_apart(name: str) -> None:
    call, x = calls()[name], tensors()
    edges = [0, 1, 20, T]
    row = {n: y if n == "sinks" else y[:1] for n, y in x.items()}
    parts = [
        call({n: y if n == "sinks" else y[:, start:end] for n, y in row.items()})
        for start, end in pairwise(edges)
    ]
    close(call(row, cu_seqlens=torch.tensor(edges)), torch.cat(parts, dim=1))


@pytest.mark.parametrize("name", calls())
def test_gradients_flow_to_every_argument(name: str) -> None:
    call, x = calls()[name], tensors()
    leaves = {n: (y if n == "sinks" else y[:1, :5].clone()).requires_grad_() for n, y in x.items()}

    def run(*given: Tensor) -> Tensor:
        return call(dict(zip(leaves, given, strict=True)))

    used = torch.autograd.grad(run(*leaves.values()).sum(), list(leaves.values()), allow_unused=True)
    expected = {
        "attention": "qkv", "sinks": ("q", "k", "v", "g", "sinks"), "forgetting": "qkvg", "window": "qkvg",
        "path": ("q", "k", "v", "g", "w", "beta"), "path_keys": ("k", "w", "beta"),
        "deltaformer": ("q", "k", "v", "beta"),
    }[name]  # fmt: skip
    assert {n for n, y in zip(leaves, used, strict=True) if y is not None} == set(expected)
    assert torch.autograd.gradcheck(run, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", calls())
def test_narrow_inputs_keep_their_dtype(name: str) -> None:
    call, x = calls()[name], tensors()
    narrow = {n: y.to(torch.bfloat16) if n in "qkv" else y.float() for n, y in x.items()}
    o = call(narrow)
    assert o.dtype == torch.bfloat16
    expected = call({n: y.double() for n, y in narrow.items()})
    torch.testing.assert_close(o.double(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("gated", [False, True])
def test_scores_are_given_on_request(gated: bool) -> None:
    x = tensors()
    q, k, g = x["q"][:, :, :H], x["k"], x["g"][..., :H] if gated else None
    for o, scores in (
        fla.parallel_simple_gla(q, k, x["v"], g, 0.7, output_attentions=True),
        fla.parallel_retention(q, k, x["v"], 0.7, output_attentions=True),
    ):
        close(torch.einsum("bhts,bshv->bthv", scores, x["v"]).float(), o.float().double().float())
    close(fla.parallel_simple_gla(q, k, x["v"], g)[0], fla.chunk_simple_gla(q, k, x["v"], g)[0])
    close(fla.parallel_retention(q, k, x["v"])[0], fla.chunk_retention(q, k, x["v"])[0])
    assert fla.parallel_retention(q, k, x["v"])[1] is None
    if g is not None:  # what is forgotten at once leaves no trace and no NaN
        g = g.clone()
        g[:, 20] = -torch.inf
        o, scores = fla.parallel_simple_gla(q, k, x["v"], g, output_attentions=True)
        assert not scores[..., 20:, :20].any()
        close(torch.einsum("bhts,bshv->bthv", scores, x["v"]), o)


X = tensors()
REFUSALS: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (fla.parallel_attn, {"window_size": 0}, ConfigError, "window_size"),
    (fla.parallel_attn, {"q": X["q"][:, :, :3]}, ShapeError, "multiple"),
    (fla.parallel_attn, {"k": X["v"]}, ShapeError, "channels"),
    (fla.parallel_attn, {"g": X["beta"]}, ShapeError, r"\[B, T, HQ\]"),
    (fla.parallel_attn, {"sink_bias": X["sinks"][:2]}, ShapeError, "sink_bias"),
    (fla.parallel_attn, {"cu_seqlens": torch.tensor([0, T])}, ShapeError, "B == 1"),
    (fla.parallel_path_attn, {"w": X["q"], "beta": X["beta"]}, ShapeError, "w must"),
    (fla.parallel_path_attn, {"w": X["w"], "beta": X["beta"], "g": X["beta"]}, ShapeError, "g must"),
    (fla.deltaformer_attn, {}, ShapeError, "share"),
    (fla.deltaformer_attn, {"q": X["k"], "attention_mask": torch.ones(B, 3)}, ShapeError, "attention_mask"),
    (fla.parallel_retention, {"q": X["k"][:1], "k": X["k"][:1], "v": X["v"][:1], "output_attentions": True,
                              "cu_seqlens": torch.tensor([0, T])}, ConfigError, "packed"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "options", "error", "message"), REFUSALS)
def test_what_does_not_fit_says_so(
    f: Callable[..., Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        f(**{"q": X["q"], "k": X["k"], "v": X["v"], **options})
