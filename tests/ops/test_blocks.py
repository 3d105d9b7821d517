"""The selector of blocks against its float64 reference: whole, packed, cached and in pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops import BlockTable, Paged, Sequences, pick_blocks
from support.device import device

KINDS: dict[str, dict[str, Any]] = {
    "tokens, largest": {"count": 3, "block": 4},
    "tokens, two local blocks": {"count": 3, "block": 4, "last": 2},
    "nothing forced": {"count": 2, "block": 3, "last": 0},
    "means of blocks": {"count": 3, "block": 4, "stride": 4, "groups": 4},
    "shares of attention": {
        "count": 4, "block": 8, "stride": 2, "width": 4, "score": "softmax", "first": 1, "last": 2, "groups": 2,
    },
    "shares of attention, summed": {
        "count": 4, "block": 4, "stride": 2, "width": 6, "score": "softmax", "pooling": "sum", "first": 1, "groups": 2,
    },
    "products, summed": {"count": 2, "block": 4, "stride": 2, "width": 4, "pooling": "sum", "groups": 1, "last": 0},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(T: int, S: int, kind: str, B: int = 2, seed: int = 0, whole: bool = True) -> tuple[Tensor, Tensor]:
    """Whole numbers, whose sums of products are exact and often equal, or any."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, 4, 3), (B, S // KINDS[kind].get("stride", 1), 2, 3)
    if whole:
        q, k = (torch.randint(-2, 3, shape, generator=generator).double() for shape in shapes)
    else:
        q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(device()), k.to(device())


@every_kind
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 3), (1, 40), (6, 6), (50, 50), (20, 61)])
def test_picks_what_the_reference_picks(kind: str, T: int, S: int, whole: bool) -> None:
    # Shares are no whole numbers: equal ones may come out differently in another order of summing.
    q, k = inputs(T, S, kind, whole=whole and KINDS[kind].get("score") != "softmax")
    options = {**KINDS[kind], "scale": 0.5, "tokens": (S, S)}
    got = pick_blocks(q, k, **options)
    assert got.dtype == torch.int32
    assert torch.equal(got, pick_blocks(q, k, impl="reference", **options))


@every_kind
@settings(max_examples=15)
@given(
    each=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4).filter(
        lambda each: any(new for new, _ in each)
    )
)
def test_sequences_of_different_lengths_pick_as_if_alone(kind: str, each: list[tuple[int, int]]) -> None:
    new, tokens = [a for a, _ in each], [a + b for a, b in each]
    q = inputs(sum(new), 1, kind, B=1, whole=False)[0]
    k = [inputs(1, n, kind, B=1, seed=9 + i, whole=False)[1] for i, n in enumerate(tokens)]
    options = KINDS[kind]
    got = pick_blocks(q, tuple(k), tokens=tokens, cu_seqlens=Sequences(tuple(new)), **options)
    parts = [
        pick_blocks(part, k[n], tokens=[tokens[n]], **options)
        for n, part in enumerate(q.split(new, dim=1))
        if part.shape[1]
    ]
    parts = [torch.nn.functional.pad(x, (0, got.shape[-1] - x.shape[-1]), value=-1) for x in parts]
    assert torch.equal(got, torch.cat(parts, dim=1))
    expected = pick_blocks(
        q, tuple(k), tokens=tokens, cu_seqlens=Sequences(tuple(new)), impl="reference", **options
    )
    assert torch.equal(got, expected)
    if options.get("stride", 1) == 1 and not any(b for _, b in each):
        laid = torch.cat(k, dim=1)
        assert torch.equal(pick_blocks(q, laid, cu_seqlens=Sequences(tuple(new)), **options), got)


def test_pages_are_read_where_they_lie() -> None:
    q, k = inputs(5, 48, "means of blocks", B=1)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0))
    pages = torch.empty(3, 4, 2, 3, dtype=k.dtype, device=k.device)
    pages[order] = k[0].unflatten(0, (3, 4))
    paged = Paged(pages, BlockTable(order[None], (12,), 4))
    options = {**KINDS["means of blocks"], "tokens": (48,)}
    assert torch.equal(pick_blocks(q, paged, **options), pick_blocks(q, k, **options))


@every_kind
def test_the_future_changes_no_choice(kind: str) -> None:
    q, k = (x.float() for x in inputs(40, 40, kind, whole=False))
    before = pick_blocks(q, k, tokens=(40, 40), **KINDS[kind])
    for bad in (5.0, torch.inf, torch.nan):
        changed = k.clone()
        changed[:, 20 // KINDS[kind].get("stride", 1) :] = bad
        assert torch.equal(pick_blocks(q, changed, tokens=(40, 40), **KINDS[kind])[:, :20], before[:, :20])


def test_what_is_always_picked_is_picked_whatever_the_scores() -> None:
    q, k = inputs(60, 60, "tokens, largest")
    k[:, 8:] = torch.nan
    picked = pick_blocks(q, k, count=4, block=4, first=1, last=2)
    for t in range(60):
        own = t // 4
        assert all({0, max(own - 1, 0), own} <= set(row.tolist()) for row in picked[:, t].flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 1, "block": 4, "first": 1}, "more than count"),
        ({"count": 0, "block": 4}, "at least 1"),
        ({"count": 1, "block": 3, "stride": 2}, "multiples"),
        ({"count": 1, "block": 4, "score": "sum"}, "'product' or 'softmax'"),
    ],
)
def test_numbers_that_do_not_go_together(options: dict[str, Any], match: str) -> None:
    q, k = inputs(8, 8, "tokens, largest")
    with pytest.raises(ConfigError, match=match):
        pick_blocks(q, k, **options)


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k = inputs(8, 8, "tokens, largest")
    with pytest.raises(ShapeError, match="k must be"):
        pick_blocks(q, k[..., 1:], count=1, block=4)
    with pytest.raises(ShapeError, match="groups=3"):
        pick_blocks(q, k, count=1, block=4, groups=3)
    with pytest.raises(ShapeError, match="8 queries and 8 keys"):
        pick_blocks(q, k, count=1, block=4, tokens=(9, 9))
