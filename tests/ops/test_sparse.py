"""Sparse attention and its indexer against their float64 references: whole, packed, cached, ragged and in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import (
    BlockTable,
    Paged,
    Sequences,
    indexer_torch,
    latent_attention,
    lightning_indexer,
    native,
    softmax_attention,
    sparse_attention,
    sparse_cpu,
    sparse_latent_attention,
    sparse_torch,
)
from intarsia.ops.attention_recorded import Room
from intarsia.ops.keys import Keys
from support.budget import assert_within_budget
from support.device import device

H, HKV, K, V, RANK, SHARED = 4, 2, 8, 6, 10, 4
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(native.missing_reason()), reason="no native kernels"))
CPU_ALONE = CPU.marks[0]
WHOLE = [(1, 1), (1, 50), (5, 5), (5, 60), (90, 90), (40, 71)]
lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=5).filter(
    lambda each: any(new for new, _ in each)
)
"""Of each sequence, how many queries and how many keys before the first of them."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device(), dtype)


def whole_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """From -2 to 2: sums of their products are exact in every dtype, whatever the order, and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(device(), dtype)


def in_pages(rows: Sequence[Tensor], page_size: int) -> Paged:
    """The rows `[1, S_n, ...]` in pages that lie anywhere, between others full of NaN."""
    counts = [-(-row.shape[1] // page_size) for row in rows]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    pages = rows[0].new_full((sum(counts) + 3, page_size, *rows[0].shape[2:]), torch.nan)
    table: list[list[int]] = []
    for n, row in enumerate(rows):
        own = [order.pop() for _ in range(counts[n])]
        for i, page in enumerate(own):
            part = row[0, i * page_size : (i + 1) * page_size]
            pages[page, : part.shape[0]] = part
        table.append(own)
    return Paged(pages, BlockTable(table, [row.shape[1] for row in rows], page_size))


def any_picked(B: int, T: int, S: int, groups: int, block: int, n: int = 5, seed: int = 0) -> Tensor:
    """Blocks that queries see some token of, each once, sometimes fewer than n, sometimes none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((B, T, groups, n), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            for g in range(groups):
                there = torch.randperm((S - T + t) // block + 1, generator=generator)[:n]
                there = there[: int(torch.randint(0, n + 1, (1,), generator=generator))].sort().values
                rows[b, t, g, : len(there)] = there
    return rows.to(device())


def one_by_one(q: Tensor, each: list[tuple[int, int]], run: Any) -> Tensor:
    parts = q.split([new for new, _ in each], dim=1)
    return torch.cat([run(n, part) for n, part in enumerate(parts) if part.shape[1]], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("T", "S"), WHOLE)
def test_the_indexer_picks_what_the_reference_picks_where_many_scores_are_equal(
    T: int, S: int, relu: bool, dtype: torch.dtype
) -> None:
    q, k, w = (whole_numbers(2, *x, seed=n, dtype=dtype) for n, x in enumerate([(T, 3, 4), (S, 4), (T, 3)]))
    options: dict[str, Any] = {"count": 9, "relu": relu, "scale": 0.5}
    got = lightning_indexer(q, k, w, **options)
    expected = lightning_indexer(q, k, w, impl="reference", **options)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("T", "S", "block"), [(1, 1, 4), (1, 3, 4), (1, 8, 4), (9, 9, 4), (50, 50, 3), (7, 61, 5), (6, 25, 4)]
)
def test_blocks_are_picked_when_they_are_complete_and_the_tail_always(T: int, S: int, block: int) -> None:
    q, k, w = (whole_numbers(2, *x, seed=n) for n, x in enumerate([(T, 3, 4), (S // block, 4), (T, 3)]))
    options: dict[str, Any] = {"count": 3, "block": block, "tokens": (S, S)}
    got = lightning_indexer(q, k, w, **options)
    assert torch.equal(got, lightning_indexer(q, k, w, impl="reference", **options))
    for t in range(T):
        seen = S - T + t + 1
        for row in got[:, t, 0].tolist():
            there = [b for b in row if b >= 0]
            assert there == sorted(set(there))
            assert len(there) == min(seen // block, 3) + (seen % block > 0)
            assert (seen // block in there) == (seen % block > 0)


@settings(max_examples=25)
@given(each=lengths, page_size=st.sampled_from([1, 4, 16]), block=st.sampled_from([1, 3]))
def test_the_indexer_takes_sequences_of_different_lengths(
    each: list[tuple[int, int]], page_size: int, block: int
) -> None:
    new, tokens = sum(n for n, _ in each), [a + b for a, b in each]
    q, w = whole_numbers(1, new, 3, 4), whole_numbers(1, new, 3, seed=1)
    k = [whole_numbers(1, n // block, 4, seed=10 + i) for i, n in enumerate(tokens)]
    seqs = Sequences(tuple(n for n, _ in each))
    options: dict[str, Any] = {"count": 4, "block": block}
    expected = lightning_indexer(q, tuple(k), w, tokens=tokens, cu_seqlens=seqs, impl="reference", **options)
    assert torch.equal(lightning_indexer(q, tuple(k), w, tokens=tokens, cu_seqlens=seqs, **options), expected)
    if sum(x.shape[1] for x in k):
        paged = lightning_indexer(q, in_pages(k, page_size), w, tokens=tokens, cu_seqlens=seqs, **options)
        assert torch.equal(paged, expected)

    def alone(n: int, part: Tensor) -> Tensor:
        begin = seqs.starts[n]
        found = lightning_indexer(
            part, k[n], w[:, begin : begin + part.shape[1]], tokens=[tokens[n]], **options
        )
        return torch.nn.functional.pad(found, (0, expected.shape[-1] - found.shape[-1]), value=-1)

    assert torch.equal(one_by_one(q, each, alone), expected)


@settings(max_examples=15)
@given(each=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any))
def test_packed_sequences_are_indexed_as_if_alone(each: list[int]) -> None:
    total = sum(each)
    q, k, w = (whole_numbers(1, total, *x, seed=n) for n, x in enumerate([(3, 4), (4,), (3,)]))
    seqs = Sequences(tuple(each))
    expected = lightning_indexer(q, k, w, count=6, cu_seqlens=seqs, impl="reference")
    assert torch.equal(lightning_indexer(q, k, w, count=6, cu_seqlens=seqs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_better_key_than_rounding_explains_is_left_out(dtype: torch.dtype, trial: int) -> None:
    """Scores are sums of K and of H products in float32: `(K + H + 2) u` of the sum of their sizes is what they can be
    off (Higham 2002, section 3.1), u half a spacing; a key is left out for one that is worse by twice that at most."""
    T, heads, count = 120, 3, 10
    q, k, w = (
        normal(1, *x, seed=trial + n, dtype=dtype) for n, x in enumerate([(T, heads, K), (T, K), (T, heads)])
    )
    picked = lightning_indexer(q, k, w, count=count)[0, :, 0].long()
    exact, size = (
        (w_[:, :, None] * (torch.einsum("thk,sk->ths", q_, k_) * K**-0.5).relu()).sum(1)
        for q_, k_, w_ in (
            (q[0].double(), k[0].double(), w[0].double()),
            (q[0].double().abs(), k[0].double().abs(), w[0].double().abs()),
        )
    )
    unit = torch.finfo(torch.float32).eps / 2
    for t in range(count, T):
        there = picked[t]
        others = [s for s in range(t + 1) if s not in there.tolist()]
        bound = 2 * (K + heads + 2) * unit * size[t, : t + 1].max()
        assert exact[t, there].min() >= exact[t, others].max() - bound


def test_the_future_changes_no_choice() -> None:
    q, k, w = (
        normal(1, *x, seed=n, dtype=torch.float32) for n, x in enumerate([(100, 3, K), (100, K), (100, 3)])
    )
    before = lightning_indexer(q, k, w, count=8)
    for bad in (5.0, torch.inf, torch.nan):
        k[:, 60:] = bad
        w[:, 60:] = bad
        assert torch.equal(lightning_indexer(q, k, w, count=8)[:, :60], before[:, :60])


LAYOUTS = [(HKV, 1, 1), (HKV, HKV, 1), (HKV, H, 1), (1, 1, 4), (HKV, HKV, 4), (H, 2, 3), (1, H, 1)]
layout = pytest.mark.parametrize(("heads", "groups", "block"), LAYOUTS)


@layout
@pytest.mark.parametrize(("T", "S"), WHOLE)
def test_equals_the_reference(T: int, S: int, heads: int, groups: int, block: int) -> None:
    q, k, v = normal(2, T, H, K), normal(2, S, heads, K, seed=1), normal(2, S, heads, V, seed=2)
    picked = any_picked(2, T, S, groups, block)
    options: dict[str, Any] = {"block": block, "scale": 0.4}
    expected = sparse_attention(q, k, v, picked, impl="reference", **options)
    torch.testing.assert_close(sparse_attention(q, k, v, picked, **options), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(("T", "S"), WHOLE)
def test_latents_equal_the_reference(T: int, S: int, block: int) -> None:
    q, latents, up = (
        normal(2, T, H, K),
        normal(2, S, RANK + SHARED, seed=1),
        normal(H, K - SHARED + V, RANK, seed=2),
    )
    picked = any_picked(2, T, S, 1, block)
    expected = sparse_latent_attention(q, latents, up, picked, block=block, impl="reference")
    got = sparse_latent_attention(q, latents, up, picked, block=block)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_who_picks_everything_attends_to_everything() -> None:
    T, S, block = 30, 45, 4
    everything = torch.arange(-(-S // block), dtype=torch.int32)[None, None, None].expand(2, T, 1, -1)
    q, k, v = normal(2, T, H, K), normal(2, S, HKV, K, seed=1), normal(2, S, HKV, V, seed=2)
    got = sparse_attention(q, k, v, everything, block=block)
    torch.testing.assert_close(got, softmax_attention(q, k, v), rtol=1e-10, atol=1e-12)
    latents, up = normal(2, S, RANK + SHARED, seed=1), normal(H, K - SHARED + V, RANK, seed=2)
    got = sparse_latent_attention(q, latents, up, everything, block=block)
    torch.testing.assert_close(got, latent_attention(q, latents, up), rtol=1e-10, atol=1e-12)


@settings(max_examples=25)
@given(
    each=lengths,
    page_size=st.sampled_from([1, 4, 16]),
    block=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
)
def test_sequences_of_different_lengths_equal_one_by_one(
    each: list[tuple[int, int]], page_size: int, block: int, groups: int
) -> None:
    q = normal(1, sum(new for new, _ in each), H, K)
    k, v, latents = (
        [normal(1, new + past, *entry, seed=seed + n) for n, (new, past) in enumerate(each)]
        for seed, entry in ((10, (HKV, K)), (20, (HKV, V)), (30, (RANK + SHARED,)))
    )
    up = normal(H, K - SHARED + V, RANK, seed=2)
    chosen = [
        any_picked(1, new, new + past, groups, block, seed=n) for n, (new, past) in enumerate(each) if new
    ]
    picked, seqs = torch.cat(chosen, dim=1), Sequences(tuple(new for new, _ in each))
    starts = seqs.starts

    def of(n: int, part: Tensor) -> Tensor:
        return picked[:, starts[n] : starts[n] + part.shape[1]]

    def close(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    expected = one_by_one(q, each, lambda n, x: sparse_attention(x, k[n], v[n], of(n, x), block=block))
    layouts: list[tuple[Keys, Keys]] = [
        (tuple(k), tuple(v)),
        (in_pages(k, page_size), in_pages(v, page_size)),
    ]
    for keys, values in layouts:
        close(sparse_attention(q, keys, values, picked, block=block, cu_seqlens=seqs), expected)
    expected = one_by_one(
        q, each, lambda n, x: sparse_latent_attention(x, latents[n], up, of(n, x), block=block)
    )
    for held in (tuple(latents), in_pages(latents, page_size)):
        close(sparse_latent_attention(q, held, up, picked, block=block, cu_seqlens=seqs), expected)


def test_batches_of_growing_tensors_are_read_where_they_lie() -> None:
    """Whose rows have room behind them, and so lie apart."""
    k, v = (normal(3, 90, HKV, size, seed=size)[:, :70] for size in (K, V))
    q, picked = normal(3, 2, H, K), any_picked(3, 2, 70, HKV, 4)
    expected = sparse_attention(q, k.contiguous(), v.contiguous(), picked, block=4)
    torch.testing.assert_close(sparse_attention(q, k, v, picked, block=4), expected, rtol=0, atol=0)


def test_nothing_is_read_that_was_not_picked() -> None:
    T = 40
    q, k, v, picked = (
        normal(1, T, H, K),
        normal(1, T, 1, K, seed=1),
        normal(1, T, 1, V, seed=2),
        any_picked(1, T, T, 1, 1),
    )
    expected = sparse_attention(q, k, v, picked)
    unread = [j for j in range(T) if j not in picked[0, T - 1 :].tolist()[0][0]]
    k[:, unread], v[:, unread] = torch.nan, torch.nan
    assert torch.equal(sparse_attention(q, k, v, picked)[:, -1], expected[:, -1])
    assert expected[:, -1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(100, 100), (3, 120)])
@pytest.mark.parametrize("impl", ["torch", CPU])
def test_keeps_the_error_budget(dtype: torch.dtype, T: int, S: int, impl: str, trial: int) -> None:
    picked = any_picked(1, T, S, HKV, 1, n=20)
    inputs = {
        "q": normal(1, T, H, K, seed=trial),
        "k": normal(1, S, HKV, K, seed=trial + 1),
        "v": normal(1, S, HKV, V, seed=trial + 2),
    }

    def run(impl: str, **x: Tensor) -> list[Tensor]:
        return [sparse_attention(**x, picked=picked, impl=impl)]

    # The weights are rounded to the dtype before they meet the values: an output of two stages.
    assert_within_budget(
        lambda **x: run(impl, **x), lambda **x: run("reference", **x), inputs, dtype, stages=2, inside=True
    )


@CPU_ALONE
@pytest.mark.parametrize("places", [1, 1 << 20])
@layout
@pytest.mark.parametrize(("T", "S"), WHOLE)
def test_the_kernels_read_the_same(
    T: int, S: int, heads: int, groups: int, block: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the form in PyTorch, whole and cached, of all queries at once and of one after the other."""
    monkeypatch.setattr(sparse_cpu, "PLACES", places)
    q, k, v = (
        normal(2, n, h, size, seed=size, dtype=torch.float32)
        for n, h, size in ((T, H, K), (S, heads, K), (S, heads, V))
    )
    picked = any_picked(2, T, S, groups, block)
    got = sparse_attention(q, k, v, picked, block=block, impl="cpu")
    torch.testing.assert_close(
        got, sparse_attention(q, k, v, picked, block=block, impl="torch"), rtol=1e-5, atol=1e-6
    )
    apart = [x.repeat_interleave(2, dim=0)[::2] for x in (k, v)]
    assert torch.equal(sparse_attention(q, *apart, picked, block=block, impl="cpu"), got)
    last = sparse_attention(q[:, -1:], k, v, picked[:, -1:], block=block, impl="cpu")
    assert torch.equal(last, got[:, -1:])


@CPU_ALONE
@settings(max_examples=20)
@given(each=lengths, page_size=st.sampled_from([1, 4, 16]), block=st.sampled_from([1, 3]))
def test_the_kernels_read_sequences_of_different_lengths(
    each: list[tuple[int, int]], page_size: int, block: int
) -> None:
    """In tensors of their own, in pages, and packed; what a query gets is the same to the bit."""
    q, up = (
        normal(*x, dtype=torch.float32)
        for x in ((1, sum(n for n, _ in each), H, K), (H, K - SHARED + V, RANK))
    )
    latents = [normal(1, a + b, RANK + SHARED, seed=n, dtype=torch.float32) for n, (a, b) in enumerate(each)]
    chosen = [any_picked(1, new, new + past, 1, block, seed=n) for n, (new, past) in enumerate(each) if new]
    picked, seqs = torch.cat(chosen, dim=1), Sequences(tuple(new for new, _ in each))
    options: dict[str, Any] = {"block": block, "cu_seqlens": seqs}
    expected = sparse_latent_attention(q, tuple(latents), up, picked, impl="torch", **options)
    got = sparse_latent_attention(q, tuple(latents), up, picked, impl="cpu", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    held = in_pages(latents, page_size)
    assert torch.equal(sparse_latent_attention(q, held, up, picked, impl="cpu", **options), got)
    own = torch.cat([x[:, past:] for x, (_, past) in zip(latents, each, strict=True)], dim=1)
    within = torch.cat(
        [any_picked(1, new, new, 1, block, seed=n) for n, (new, _) in enumerate(each) if new], dim=1
    )
    expected = sparse_latent_attention(q, own, up, within, impl="torch", **options)
    got = sparse_latent_attention(q, own, up, within, impl="cpu", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gathered", [1, 1 << 22])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_reference(
    packed: bool, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that is gathered at once, and of one query after the other."""
    monkeypatch.setattr(sparse_torch, "GATHERED", gathered)
    B, T, block = 1 if packed else 2, 30, 3
    seqs = Sequences((11, 0, 19)) if packed else None
    picked = any_picked(B, T, T, HKV, block)
    if packed:
        picked = torch.cat([any_picked(1, n, n, HKV, block) for n in (11, 19)], dim=1)
    inputs = [normal(B, T, *x, seed=n).requires_grad_() for n, x in enumerate([(H, K), (HKV, K), (HKV, V)])]
    found = []
    for impl in ("auto", "reference"):
        o = sparse_attention(*inputs, picked, block=block, cu_seqlens=seqs, impl=impl)
        found.append(torch.autograd.grad((o * normal(*o.shape, seed=9)).sum(), inputs))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


class Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_nothing_is_as_large_as_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    T, count, budget = 600, 8, 1 << 14
    monkeypatch.setattr(indexer_torch, "SCORES", budget)
    monkeypatch.setattr(sparse_torch, "GATHERED", budget)
    q, k, v = (normal(1, T, *x, seed=n).requires_grad_() for n, x in enumerate([(H, K), (HKV, K), (HKV, V)]))
    with Largest() as largest:
        picked = lightning_indexer(q, k[:, :, 0], q[..., 0], count=count)
        sparse_attention(q, k, v, picked).sum().backward()
    assert largest.numel <= max(budget, T * H * K) < T * T


def test_wrong_arguments_are_named() -> None:
    q, k, v = normal(2, 5, H, K), normal(2, 7, HKV, K), normal(2, 7, HKV, V)
    picked = torch.zeros(2, 5, 1, 3, dtype=torch.int32, device=device())
    index = q, k[:, :, 0], q[..., 0]
    for arguments, options, match in (
        ((q[0], *index[1:]), {}, "q must be"),
        ((q, k, q[..., 0]), {}, r"k must be \[B, S, K\]"),
        ((q, index[1], q), {}, "weights must be"),
        (index, {"tokens": [9, 7]}, "sequence 0 of 9 tokens"),
        (index, {"tokens": [7]}, "tokens is of 1 sequences"),
        ((q, index[1][:1], q[..., 0]), {}, "k is of 1 sequences"),
        (index, {"cu_seqlens": Sequences((5,))}, "cu_seqlens describes"),
        (
            (q[:1], index[1][:1], q[:1, ..., 0]),
            {"cu_seqlens": Sequences((2, 3))},
            "packed as the queries are",
        ),
    ):
        with pytest.raises(ShapeError, match=match):
            lightning_indexer(*arguments, **{"count": 2, **options})  # type: ignore[arg-type]
    fits = lightning_indexer(q, index[1][:, :3], q[..., 0], count=2, block=2, tokens=[7, 7])
    assert fits.shape == (2, 5, 1, 3)
    with pytest.raises(ConfigError, match="at least 1"):
        lightning_indexer(*index, count=0)
    for wrong, match in (
        (picked[0], "picked must be"),
        (picked[:, 1:], "picked must be"),
        (picked.float(), "int32 or int64"),
        (picked.expand(2, 5, 3, 3), "groups that divide the 4 query heads"),
    ):
        with pytest.raises(ShapeError, match=match):
            sparse_attention(q, k, v, wrong)
    with pytest.raises(ConfigError, match="block must be"):
        sparse_attention(q, k, v, picked, block=0)
    with pytest.raises(ShapeError, match="groups that divide the 4 heads"):
        sparse_latent_attention(
            q, normal(2, 7, RANK + SHARED), normal(H, K - SHARED + V, RANK), picked.expand(2, 5, 3, 3)
        )
    pages = torch.zeros(3, 2, K)
    room = Room(pages, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="cannot be recorded"):
        lightning_indexer(q[:1, :1], room, q[:1, :1, :, 0], count=2)  # type: ignore[arg-type]
