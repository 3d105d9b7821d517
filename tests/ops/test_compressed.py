"""Attention to compressed keys against its float64 reference: whole, packed, cached and in pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops import BlockTable, Paged, Sequences, compressed_attention, explain, native
from support.budget import assert_within_budget
from support.device import device

KINDS: dict[str, dict[str, Any]] = {
    "overlapping": {"stride": 2, "width": 6},
    "apart": {"stride": 4, "width": 4},
    "one of each token": {"stride": 1, "width": 1},
    "windows of one stride": {"stride": 1, "width": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_kernels = pytest.mark.skipif(native.missing_reason() is not None, reason="no native kernels")
every_form = pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_kernels), "torch"])


def inputs(
    T: int, S: int, kind: str, B: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and a key and value of each stride of S tokens."""
    generator = torch.Generator().manual_seed(seed)
    entries = S // KINDS[kind]["stride"]
    shapes = (B, T, 6, 5), (B, entries, 2, 5), (B, entries, 2, 3)
    found = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    q, k, v = (x.to(device(), dtype) for x in found)
    return q, k, v


@every_kind
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 3), (1, 40), (6, 6), (50, 50), (20, 61), (3, 7)])
def test_equals_the_reference_with_its_gradients(kind: str, T: int, S: int) -> None:
    options, results = {**KINDS[kind], "tokens": (S, S)}, []
    for impl in ("auto", "reference"):
        q, k, v = (x.requires_grad_() for x in inputs(T, S, kind))
        o = compressed_attention(q, k, v, impl=impl, **options)
        loss = (o * torch.linspace(-1, 1, T, dtype=torch.float64, device=o.device)[:, None, None]).sum()
        grads = (
            torch.autograd.grad(loss, (q, k, v), allow_unused=True, materialize_grads=True)
            if loss.requires_grad
            else ()
        )
        results.append((o, *grads))
    for got, expected in zip(*results, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(1, 50), (40, 70), (90, 90)])
def test_keeps_the_error_budget(kind: str, dtype: torch.dtype, T: int, S: int, native_impl: str) -> None:
    q, k, v = inputs(T, S, kind)
    options = {**KINDS[kind], "tokens": (S, S)}

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [compressed_attention(q, k, v, impl=native_impl, **options)]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [compressed_attention(q, k, v, impl="reference", **options)]

    # The weights are rounded to the dtype before they meet the values: an output of two stages.
    assert_within_budget(run, reference, {"q": q, "k": k, "v": v}, dtype, stages=2, inside=True)


@every_kind
@settings(max_examples=20)
@given(
    each=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4).filter(
        lambda each: any(new for new, _ in each)
    )
)
def test_sequences_of_different_lengths_are_as_if_alone(kind: str, each: list[tuple[int, int]]) -> None:
    new, tokens = [a for a, _ in each], [a + b for a, b in each]
    q = inputs(sum(new), 1, kind, B=1)[0]
    k, v = zip(*(inputs(1, n, kind, B=1, seed=9 + i)[1:] for i, n in enumerate(tokens)), strict=True)
    options = KINDS[kind]
    got = compressed_attention(q, k, v, tokens=tokens, cu_seqlens=Sequences(tuple(new)), **options)
    parts = [
        compressed_attention(part, k[n], v[n], tokens=[tokens[n]], **options)
        for n, part in enumerate(q.split(new, dim=1))
        if part.shape[1]
    ]
    torch.testing.assert_close(got, torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)
    expected = compressed_attention(
        q, k, v, tokens=tokens, cu_seqlens=Sequences(tuple(new)), impl="reference", **options
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("T", [1, 5])
def test_pages_are_read_where_they_lie(impl: str, T: int) -> None:
    q, k, v = inputs(T, 64, "overlapping", B=1, dtype=torch.float32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    pages = []
    for x in (k, v):
        laid = torch.full((8, 4, *x.shape[2:]), torch.nan)
        laid[order] = x[0].unflatten(0, (8, 4))
        laid[order[0], :2] = torch.nan  # those are no keys
        pages.append(laid)
    table = BlockTable(order[None], (32,), 4)
    options = {**KINDS["overlapping"], "tokens": (64,)}
    paged = compressed_attention(q, *(Paged(x, table) for x in pages), impl=impl, **options)
    torch.testing.assert_close(
        paged, compressed_attention(q, k, v, impl="reference", **options), rtol=1e-5, atol=1e-6
    )


@every_kind
@every_form
def test_the_future_changes_no_bit(kind: str, impl: str) -> None:
    """Not even the token before the last one of a window."""
    q, k, v = inputs(40, 40, kind, dtype=torch.float32)
    stride = KINDS[kind]["stride"]
    before = compressed_attention(q, k, v, tokens=(40, 40), impl=impl, **KINDS[kind])
    entry = 20 // stride
    seen = (entry + 1) * stride - 1
    for bad in (5.0, torch.inf, torch.nan):
        spoilt = [x.clone() for x in (k, v)]
        for x in spoilt:
            x[:, entry:] = bad
        after = compressed_attention(q, *spoilt, tokens=(40, 40), impl=impl, **KINDS[kind])
        assert torch.equal(after[:, :seen], before[:, :seen])
        assert not torch.equal(after[:, seen], before[:, seen])


def test_who_sees_no_key_gets_zeros() -> None:
    q, k, v = inputs(12, 12, "overlapping")
    o = compressed_attention(q, k, v, tokens=(12, 12), **KINDS["overlapping"])
    assert (o[:, :5] == 0).all()
    assert (o[:, 5:] != 0).all()


@needs_kernels
def test_one_query_is_served_by_the_kernels_and_a_whole_text_by_pytorch() -> None:
    q, k, v = inputs(1, 4000, "apart", dtype=torch.float32)
    options = {**KINDS["apart"], "tokens": (4000, 4000)}
    assert explain(compressed_attention, q, k, v, **options).impl == "cpu"
    q = inputs(4000, 4000, "apart", dtype=torch.float32)[0]
    assert explain(compressed_attention, q, k, v, **options).impl == "torch"


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v = inputs(8, 8, "apart")
    with pytest.raises(ShapeError, match="channels of q"):
        compressed_attention(q, k[..., 1:], v, stride=4)
    with pytest.raises(ShapeError, match="entry for each of k"):
        compressed_attention(q, k, v[:, 1:], stride=4)
    with pytest.raises(ShapeError, match="has 8 queries and 2 keys"):
        compressed_attention(q, k, v, stride=4, tokens=(7, 7))
    with pytest.raises(ConfigError, match="multiple"):
        compressed_attention(q, k, v, stride=4, width=6)
