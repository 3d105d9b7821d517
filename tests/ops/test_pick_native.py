"""The native choice of blocks and tokens, on every instruction set, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops import BlockTable, Paged, Sequences, lightning_indexer, native, pick_blocks, pick_cpu

pytestmark = pytest.mark.skipif(bool(native.missing_reason()), reason="no native kernels")

KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"count": 5, "block": 4, "groups": 2},
    "tokens of large blocks": {"count": 3, "block": 40, "groups": 4, "last": 2},
    "nothing forced": {"count": 2, "block": 3, "last": 0},
    "means of blocks": {"count": 3, "block": 4, "stride": 4},
    "shares": {
        "count": 4, "block": 8, "stride": 2, "width": 4, "score": "softmax", "first": 1, "last": 2, "groups": 2,
    },
    "shares, summed": {
        "count": 5, "block": 4, "stride": 2, "width": 6, "score": "softmax", "pooling": "sum", "first": 1, "groups": 2,
    },
    "products, summed": {"count": 2, "block": 4, "stride": 2, "width": 4, "pooling": "sum", "groups": 1, "last": 0},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [(1, 1), (1, 3), (1, 700), (3, 61), (50, 50), (9, 300)]
"""Queries, and tokens that the last of them sees."""


def inputs(
    T: int,
    S: int,
    stride: int,
    heads: int = 2,
    K: int = 13,
    whole: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and weights; whole numbers, whose sums of products are exact and often equal, or any."""
    generator = torch.Generator().manual_seed(T + S)
    shapes = (1, T, 4, K), (1, S // stride, heads, K), (1, T, 4)
    if whole:
        q, k, w = (torch.randint(-2, 3, shape, generator=generator) for shape in shapes)
    else:
        q, k, w = (torch.randn(shape, generator=generator) for shape in shapes)
    return q.to(dtype), k.to(dtype), w.to(dtype)


def as_reference(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_blocks_are_those_of_the_reference(
    kind: str, T: int, S: int, dtype: torch.dtype, native_impl: str
) -> None:
    options = KINDS[kind]
    whole = options.get("score") != "softmax"
    q, k, _ = inputs(T, S, options.get("stride", 1), whole=whole, dtype=dtype)
    got = pick_blocks(q, k, scale=0.5, tokens=(S,), impl=native_impl, **options)
    expected = pick_blocks(*as_reference(q, k), scale=0.5, tokens=(S,), impl="reference", **options)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("count", "block"), [(7, 1), (3, 4), (400, 1)])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_tokens_are_those_of_the_reference(
    T: int, S: int, count: int, block: int, relu: bool, native_impl: str
) -> None:
    q, k, w = inputs(T, S, block, heads=1)
    options: dict[str, Any] = {"count": count, "block": block, "relu": relu, "scale": 0.5, "tokens": (S,)}
    got = lightning_indexer(q, k[:, :, 0], w, impl=native_impl, **options)
    q, k, w = as_reference(q, k, w)
    assert torch.equal(got, lightning_indexer(q, k[:, :, 0], w, impl="reference", **options))


@pytest.mark.parametrize("K", [1, 3, 16, 33, 128])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_products_of_any_shape(K: int, heads: int, native_impl: str) -> None:
    q, k, _ = inputs(2, 70, 1, heads=heads, K=K)
    options: dict[str, Any] = {"count": 4, "block": 2, "tokens": (70,), "last": 0, "scale": 0.5}
    assert torch.equal(
        pick_blocks(q, k, impl=native_impl, **options),
        pick_blocks(q.double(), k.double(), impl="reference", **options),
    )


@every_kind
@settings(max_examples=15)
@given(
    each=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=4).filter(
        lambda each: any(new for new, _ in each)
    ),
    scores=st.sampled_from([1, 100, 1 << 22]),
)
def test_ragged_and_paged_sequences_a_few_queries_at_a_time(
    kind: str, each: list[tuple[int, int]], scores: int, native_impl: str
) -> None:
    new, tokens, options = [a for a, _ in each], [a + b for a, b in each], KINDS[kind]
    stride, before = options.get("stride", 1), pick_cpu.SCORES
    whole = options.get("score") != "softmax"
    q = inputs(sum(new), 1, 1, whole=whole)[0]
    k = [inputs(1, n, stride, whole=whole)[1] for n in tokens]
    pages, table = [torch.full((3, 2, 13), torch.nan)], []
    for row in k:
        parts = row[0].split(3) if row.shape[1] else ()
        table.append(list(range(len(pages), len(pages) + len(parts))))
        pages += [
            torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 3 - len(part)), value=torch.nan) for part in parts
        ]
    paged = Paged(torch.stack(pages), BlockTable(table, [row.shape[1] for row in k], 3))
    arguments = {**options, "scale": 0.5, "tokens": tokens, "cu_seqlens": Sequences(tuple(new))}
    expected = pick_blocks(q.double(), tuple(x.double() for x in k), impl="reference", **arguments)
    pick_cpu.SCORES = scores
    try:
        for keys in (tuple(k), paged):
            assert torch.equal(pick_blocks(q, keys, impl=native_impl, **arguments), expected)
    finally:
        pick_cpu.SCORES = before


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@every_kind
def test_what_is_not_finite_is_as_in_the_reference(kind: str, bad: float, native_impl: str) -> None:
    """And changes no choice before it."""
    options = KINDS[kind]
    q, k, _ = inputs(60, 60, options.get("stride", 1))
    before = pick_blocks(q, k, tokens=(60,), impl=native_impl, **options)
    k[:, 30 // options.get("stride", 1)] = bad
    got = pick_blocks(q, k, tokens=(60,), impl=native_impl, **options)
    assert torch.equal(got[:, :30], before[:, :30])
    in_torch = pick_blocks(q, k, tokens=(60,), impl="torch", **options)
    assert torch.equal(got, in_torch)


def test_scores_that_rise_fall_and_are_all_equal(native_impl: str) -> None:
    """Each of which the search for the best meets differently."""
    S = 5000
    for row in (
        torch.arange(S),
        -torch.arange(S),
        torch.zeros(S),
        torch.arange(S) % 7,
        -(torch.arange(S) % 2) * 0.0,
    ):
        q, k, w = torch.ones(1, 1, 1, 1), row.float()[None, :, None], torch.ones(1, 1, 1)
        for count in (1, 63, 64, 65, 2048, S):
            options: dict[str, Any] = {"count": count, "relu": False, "scale": 1.0}
            got = lightning_indexer(q, k, w, impl=native_impl, **options)
            best = sorted(sorted(range(S), key=lambda i, row=row: (-float(row[i]), i))[:count])
            assert got.flatten().tolist() == best


def test_it_says_what_it_does_not_serve() -> None:
    q, k, w = inputs(3, 3, 1, heads=1)
    with pytest.raises(UnsupportedError, match=r"score in float32; k is torch\.float64"):
        pick_blocks(q, k.double(), count=1, block=1, impl="cpu")
    with pytest.raises(UnsupportedError, match="weights"):
        lightning_indexer(q, k[:, :, 0], w.double(), count=1, impl="cpu")
