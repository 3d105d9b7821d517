"""Softmax and latent attention against their float64 references: whole, packed, cached, ragged and in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops import (
    BlockTable,
    Paged,
    Sequences,
    cumulative_log_gate,
    latent_attention,
    softmax_attention,
)
from intarsia.ops.keys import Keys
from support.budget import assert_within_budget
from support.device import device

H, HKV, K, V, RANK, SHARED = 4, 2, 8, 6, 10, 4
lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=5).filter(
    lambda each: any(new for new, _ in each)
)
"""Of each sequence, how many queries and how many keys before the first of them."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device(), dtype)


def gates(*shape: int, seed: int = 0) -> Tensor:
    return cumulative_log_gate(-normal(*shape, seed=seed).exp())


def in_pages(rows: Sequence[Tensor], page_size: int, first: Sequence[int] | None = None) -> Paged:
    """The rows `[1, S_n, ...]` in pages that lie anywhere, between others full of NaN."""
    counts = [-(-row.shape[1] // page_size) for row in rows]
    total = sum(counts)
    order = torch.randperm(total + 3, generator=torch.Generator().manual_seed(0)).tolist()
    pages = rows[0].new_full((total + 3, page_size, *rows[0].shape[2:]), torch.nan)
    table, taken = [], 0
    for n, row in enumerate(rows):
        own = order[taken : taken + counts[n]]
        taken += counts[n]
        for i, page in enumerate(own):
            part = row[0, i * page_size : (i + 1) * page_size]
            pages[page, : part.shape[0]] = part
        if first is not None:
            own = [-1 if (i + 1) * page_size <= first[n] else page for i, page in enumerate(own)]
        table.append(own)
    return Paged(pages, BlockTable(table, [row.shape[1] for row in rows], page_size, first))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 3, "sinks": True},
    "forget gate": {"gate": True},
    "forget gate, window and sinks": {"gate": True, "window": 9, "sinks": True},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def options_of(option: str) -> tuple[dict[str, Any], bool]:
    options = dict(OPTIONS[option])
    gate = options.pop("gate", False)
    if options.get("sinks"):
        options["sinks"] = normal(H, seed=9)
    return {**options, "scale": 0.4}, gate


@every_option
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 50), (5, 5), (5, 60), (200, 200), (150, 171)])
def test_equals_the_reference(option: str, T: int, S: int) -> None:
    options, gate = options_of(option)
    q, k, v = normal(2, T, H, K), normal(2, S, HKV, K, seed=1), normal(2, S, HKV, V, seed=2)
    c = gates(2, S, H, seed=3) if gate else None
    expected = softmax_attention(q, k, v, log_gate=c, impl="reference", **options)
    got = softmax_attention(q, k, v, log_gate=c, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(100, 100), (3, 120)])
def test_keeps_the_error_budget(option: str, dtype: torch.dtype, T: int, S: int, trial: int) -> None:
    options, gate = options_of(option)
    inputs = {
        "q": normal(1, T, H, K, seed=trial),
        "k": normal(1, S, HKV, K, seed=trial + 1),
        "v": normal(1, S, HKV, V, seed=trial + 2),
        "sinks": options.pop("sinks", None),
    }
    c = gates(1, S, H, seed=3) if gate else None

    def run(impl: str, **x: Tensor) -> list[Tensor]:
        return [softmax_attention(**x, log_gate=c, impl=impl, **options)]

    # The weights are rounded to the dtype before they meet the values: an output of two stages.
    assert_within_budget(
        lambda **x: run("auto", **x), lambda **x: run("reference", **x), inputs, dtype, stages=2, inside=True
    )


def ragged(each: list[tuple[int, int]], *entry: int, seed: int) -> list[Tensor]:
    return [normal(1, new + past, *entry, seed=seed + n) for n, (new, past) in enumerate(each)]


def one_by_one(q: Tensor, each: list[tuple[int, int]], run: Any) -> Tensor:
    parts = q.split([new for new, _ in each], dim=1)
    return torch.cat([run(n, part) for n, part in enumerate(parts) if part.shape[1]], dim=1)


@every_option
@settings(max_examples=20)
@given(each=lengths, page_size=st.sampled_from([1, 4, 16]))
def test_sequences_of_different_lengths_equal_one_by_one(
    option: str, each: list[tuple[int, int]], page_size: int
) -> None:
    options, gate = options_of(option)
    q = normal(1, sum(new for new, _ in each), H, K)
    k, v = ragged(each, HKV, K, seed=10), ragged(each, HKV, V, seed=20)
    c = [gates(*x.shape[:2], H, seed=30 + n) for n, x in enumerate(k)] if gate else None
    seqs = Sequences(tuple(new for new, _ in each))

    def alone(n: int, part: Tensor) -> Tensor:
        return softmax_attention(part, k[n], v[n], log_gate=None if c is None else c[n], **options)

    expected = one_by_one(q, each, alone)
    as_rows = tuple(k), tuple(v), None if c is None else tuple(c)
    # A window leaves behind what no query sees any more.
    window = options.get("window")
    first = None if window is None else [max(0, past + 1 - window) for _, past in each]
    as_pages = [None if x is None else in_pages(x, page_size, first) for x in (k, v, c)]
    for keys, values, sums in (as_rows, as_pages):
        got = softmax_attention(q, keys, values, log_gate=sums, cu_seqlens=seqs, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if first is None:
        keys, values, sums = as_pages
        got = softmax_attention(q, keys, values, log_gate=sums, cu_seqlens=seqs, impl="reference", **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@every_option
@settings(max_examples=10)
@given(pasts=st.lists(st.integers(0, 40), min_size=1, max_size=5), T=st.integers(1, 10))
def test_a_batch_with_as_many_queries_each_equals_one_by_one(option: str, pasts: list[int], T: int) -> None:
    options, gate = options_of(option)
    each = [(T, past) for past in pasts]
    q = normal(len(each), T, H, K)
    k, v = ragged(each, HKV, K, seed=10), ragged(each, HKV, V, seed=20)
    c = [gates(*x.shape[:2], H, seed=30 + n) for n, x in enumerate(k)] if gate else None
    expected = torch.cat(
        [
            softmax_attention(part, k[n], v[n], log_gate=None if c is None else c[n], **options)
            for n, part in enumerate(q.split(1))
        ]
    )
    for form in (tuple, lambda rows: in_pages(rows, 8)):
        keys: list[Keys | None] = [None if x is None else form(x) for x in (k, v, c)]
        got = softmax_attention(q, keys[0], keys[1], log_gate=keys[2], **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@every_option
@pytest.mark.parametrize("sizes", [(30, 0, 1, 140), (20, 20, 0, 20, 7, 7, 1, 1, 20)], ids=str)
def test_packed_sequences_do_not_see_each_other(option: str, sizes: tuple[int, ...]) -> None:
    options, gate = options_of(option)
    each = [(size, 0) for size in sizes]
    total = sum(new for new, _ in each)
    shapes = ((H, K), (HKV, K), (HKV, V))
    q, k, v = (normal(1, total, *shape, seed=n).requires_grad_() for n, shape in enumerate(shapes))
    seqs = Sequences(sizes)
    c = cumulative_log_gate(-normal(1, total, H, seed=3).exp(), seqs=seqs) if gate else None
    rows = [None if x is None else x.split(seqs.lengths, dim=1) for x in (k, v, c)]

    def alone(n: int, part: Tensor) -> Tensor:
        k, v, c = (None if x is None else x[n] for x in rows)
        return softmax_attention(part, k, v, log_gate=c, **options)

    expected = one_by_one(q, each, alone)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for impl in ("auto", "reference"):
        got = softmax_attention(q, k, v, log_gate=c, cu_seqlens=seqs, impl=impl, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        found = torch.autograd.grad(got.square().sum(), (q, k, v))
        torch.testing.assert_close(found, gradients, rtol=1e-8, atol=1e-10)


@every_option
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("S", [40, 47])
def test_what_is_not_finite_reaches_no_earlier_query(option: str, bad: float, S: int) -> None:
    options, gate = options_of(option)
    if "sinks" in options:
        options["sinks"] = options["sinks"].float()
    T, token = 40, 30
    q, k, v = (
        normal(2, n, heads, dim, seed=seed, dtype=torch.float32)
        for seed, (n, heads, dim) in enumerate(((T, H, K), (S, HKV, K), (S, HKV, V)))
    )
    c = gates(2, S, H, seed=3) if gate else None
    expected = softmax_attention(q, k, v, log_gate=c, **options)
    for name in ("k", "v"):
        changed = {"k": k.clone(), "v": v.clone()}
        changed[name][0, S - T + token :] = bad
        got = softmax_attention(q, **changed, log_gate=c, **options)
        assert torch.equal(got[0, :token], expected[0, :token])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("option", ["plain", "window and sinks", "forget gate, window and sinks"])
@pytest.mark.parametrize("T", [5, 12])
def test_gradients_equal_those_of_the_reference(option: str, T: int) -> None:
    options, gate = options_of(option)
    leaves = [
        normal(1, 12, h, d, seed=n).requires_grad_() for n, (h, d) in enumerate(((H, K), (HKV, K), (HKV, V)))
    ]
    g = normal(1, 12, H, seed=5).requires_grad_()
    found = []
    for impl in ("auto", "reference"):
        c = cumulative_log_gate(-g.exp()) if gate else None
        o = softmax_attention(leaves[0][:, -T:], *leaves[1:], log_gate=c, impl=impl, **options)
        wanted = [*leaves, g] if gate else leaves
        found.append(torch.autograd.grad((o * normal(*o.shape, seed=8)).sum(), wanted))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# Latents


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 50), (5, 5), (3, 60), (20, 60), (150, 150)])
@pytest.mark.parametrize("shared", [0, SHARED])
def test_latent_attention_equals_the_reference(T: int, S: int, shared: int) -> None:
    q, latents = normal(2, T, H, K + shared), normal(2, S, RANK + shared, seed=1)
    up = normal(H, K + V, RANK, seed=2)
    expected = latent_attention(q, latents, up, scale=0.2, impl="reference")
    got = latent_attention(q, latents, up, scale=0.2)
    assert got.shape == (2, T, H, V)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@settings(max_examples=20)
@given(each=lengths, page_size=st.sampled_from([1, 4, 16]))
def test_latents_of_different_lengths_equal_one_by_one(each: list[tuple[int, int]], page_size: int) -> None:
    q, up = normal(1, sum(new for new, _ in each), H, K + SHARED), normal(H, K + V, RANK, seed=2)
    latents = ragged(each, RANK + SHARED, seed=10)
    seqs = Sequences(tuple(new for new, _ in each))
    expected = one_by_one(q, each, lambda n, part: latent_attention(part, latents[n], up))
    for keys in (tuple(latents), in_pages(latents, page_size)):
        for impl in ("auto", "reference"):
            got = latent_attention(q, keys, up, cu_seqlens=seqs, impl=impl)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_packed_latents_do_not_see_each_other() -> None:
    each = [(30, 0), (1, 0), (50, 0)]
    q, latents = normal(1, 81, H, K + SHARED), normal(1, 81, RANK + SHARED, seed=1)
    up, seqs = normal(H, K + V, RANK, seed=2), Sequences((30, 1, 50))
    rows = latents.split(seqs.lengths, dim=1)
    expected = one_by_one(q, each, lambda n, part: latent_attention(part, rows[n], up))
    for impl in ("auto", "reference"):
        got = latent_attention(q, latents, up, cu_seqlens=seqs, impl=impl)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# What cannot be


def test_wrong_arguments_are_named() -> None:
    q, k, v = normal(2, 5, H, K), normal(2, 9, HKV, K), normal(2, 9, HKV, V)
    for changes, message in (
        ({"q": q[0]}, "q must be"),
        ({"q": q[:, :0]}, "at least one element"),
        ({"k": k[..., 1:]}, "channels of q"),
        ({"k": k[:, :3], "v": v[:, :3]}, "S >= T"),
        ({"v": v[:, :7]}, "an entry for each of k"),
        ({"v": v[:, :, :1]}, "heads of k"),
        ({"q": q[:, :, :3]}, "multiple of the key heads"),
        ({"sinks": normal(3)}, "sinks must be"),
        ({"log_gate": normal(2, 9, 3)}, "log_gate must have"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "B == 1"),
        ({"k": (k[:1],), "v": (v[:1],)}, "of 1 sequences and q of 2"),
        ({"k": (k[:1], k[:1, :4]), "v": (v[:1], v[:1, :4])}, "5 queries and 4 entries"),
        ({"k": (k[:1], k[:1, :, :1]), "v": (v[:1], v[:1])}, "of one dtype and device"),
        ({"k": (), "v": ()}, "a tensor of each"),
    ):
        with pytest.raises(ShapeError, match=message):
            softmax_attention(**{"q": q, "k": k, "v": v, **changes})
    with pytest.raises(ConfigError, match="window must be positive"):
        softmax_attention(q, k, v, window=0)
    with pytest.raises(ConfigError, match="no impl='native'"):
        softmax_attention(q, k, v, impl="native")
    with pytest.raises(ShapeError, match="up must be"):
        latent_attention(normal(1, 3, H, K), normal(1, 3, RANK), normal(H, K, RANK))


def test_a_block_table_that_points_outside_is_named() -> None:
    pages = normal(4, 8, HKV, K)
    with pytest.raises(ShapeError, match="page 4; there are 4"):
        Paged(pages, BlockTable([[0, 4]], [9], 8))
    with pytest.raises(ShapeError, match="should be"):
        Paged(pages, BlockTable([[0]], [3], 16))
    with pytest.raises(ShapeError, match="room for 8"):
        BlockTable([[0]], [9], 8)
    with pytest.raises(ShapeError, match="sequence 1 from 8 on lie in no page"):
        BlockTable([[0, 1], [2]], [9, 9], 8)
    with pytest.raises(ShapeError, match="entries from 4 on and has 3"):
        BlockTable([[0]], [3], 8, [4])
    assert BlockTable([[0, 1], [-1, 2]], [9, 9], 8, [0, 8]).highest == 2
