"""The parts of the operators: decay products, triangular inverses, chunk layouts, packed sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ShapeError
from intarsia.ops import Sequences
from intarsia.ops.chunk_layout import ChunkLayout
from intarsia.ops.decay import Moment, Row, Scores, decay_matrix, scores
from intarsia.ops.triangular import corners, from_corners, unit_lower_inverse

SIZES = [1, 2, 4, 16, 64]


@pytest.mark.parametrize("C", SIZES)
def test_decay_matrix_is_the_products_of_the_factors_between(C: int) -> None:
    alpha = torch.rand(3, C, dtype=torch.float64)
    alpha[alpha < 0.1] = 0
    from_start, to_end, between = decay_matrix(alpha)
    for i in range(C):
        torch.testing.assert_close(from_start[:, i], alpha[:, : i + 1].prod(-1))
        torch.testing.assert_close(to_end[:, i], alpha[:, i + 1 :].prod(-1))
        for j in range(C):
            expected = alpha[:, j + 1 : i + 1].prod(-1) if j <= i else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(between[:, i, j], expected)


MOMENTS: tuple[Moment, ...] = ("written", "decayed", "before")


@pytest.mark.parametrize("C", SIZES)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_scores_are_rows_times_decayed_columns(C: int, decay: str) -> None:
    q, r, b, k, a = torch.randn(5, 2, C, 5, dtype=torch.float64)
    factors = torch.rand(2, C, 5, dtype=torch.float64)
    factors[factors < 0.1] = 0
    if decay == "none":
        factors = torch.ones_like(factors)
    elif decay == "head":
        factors = factors[..., :1].expand_as(factors)
    alpha = {"none": None, "head": factors[..., 0], "channel": factors}[decay]
    rows = dict(zip(MOMENTS, (q, r, b), strict=True))
    found = scores([Row(x, moment) for moment, x in rows.items()], [k, a], alpha)

    def product(start: int, stop: int) -> torch.Tensor:
        return factors[:, start:stop].prod(1)

    for (moment, x), start, between in zip(rows.items(), found.starts, found.between, strict=True):
        # The last factor that has met the board when the row reads it.
        last = [i if moment == "before" else i + 1 for i in range(C)]
        torch.testing.assert_close(start, torch.stack([x[:, i] * product(0, last[i]) for i in range(C)], 1))
        for column, matrix in zip((k, a), between, strict=True):
            for i in range(C):
                for j in range(C):
                    if j < i + (moment == "written"):
                        expected = (x[:, i] * product(j + 1, last[i]) * column[:, j]).sum(-1)
                        torch.testing.assert_close(matrix[:, i, j], expected)
                    elif moment != "decayed":
                        assert not matrix[:, i, j].any()
    for column, end in zip((k, a), found.ends, strict=True):
        torch.testing.assert_close(end, torch.stack([column[:, j] * product(j + 1, C) for j in range(C)], 1))
    if decay == "none":
        assert found.total is None
    else:
        torch.testing.assert_close(found.total.expand(2, 5, 1), product(0, C)[..., None])


@pytest.mark.parametrize("C", SIZES)
def test_gradients_of_the_parts(C: int) -> None:
    C = min(C, 8)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def flat_scores(
        q: torch.Tensor, r: torch.Tensor, b: torch.Tensor, *others: torch.Tensor
    ) -> list[torch.Tensor]:
        *columns, alpha = others
        rows = [Row(x, moment) for x, moment in zip((q, r, b), MOMENTS, strict=True)]
        x: Scores = scores(rows, columns, alpha)
        return [*(matrix for row in x.between for matrix in row), *x.starts, *x.ends, x.total]

    assert torch.autograd.gradcheck(flat_scores, tuple(leaf(1, C, 2) for _ in range(6)))
    assert torch.autograd.gradcheck(decay_matrix, (leaf(1, C),))
    assert torch.autograd.gradcheck(unit_lower_inverse, (leaf(2, C, C),))


@pytest.mark.parametrize("C", SIZES)
def test_unit_lower_inverse(C: int) -> None:
    n = torch.randn(3, C, C, dtype=torch.float64) * 0.3
    inverse = unit_lower_inverse(n)
    eye = torch.eye(C, dtype=torch.float64)
    torch.testing.assert_close(inverse @ (eye + n.tril(-1)), eye.expand(3, C, C))
    assert torch.equal(inverse.triu(1), torch.zeros_like(inverse))


def test_unit_lower_inverse_is_accurate_where_powers_of_the_matrix_explode() -> None:
    """Equal keys and beta = 1: all entries one. The inverse is a difference; its power series reaches 1e18."""
    n = torch.ones(1, 64, 64)
    expected = torch.eye(64) - torch.eye(64).roll(1, 0).tril(-1)
    assert torch.equal(unit_lower_inverse(n)[0], expected)


@pytest.mark.parametrize("C", SIZES)
def test_a_matrix_is_its_diagonal_and_its_corners(C: int) -> None:
    matrix = torch.randn(2, C, C).tril()
    sizes = [1 << level for level in range(C.bit_length() - 1)]
    rebuilt = from_corners(matrix.diagonal(dim1=-2, dim2=-1), [corners(matrix, size) for size in sizes])
    assert torch.equal(rebuilt, matrix)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 4, 16]))
def test_chunks_hold_each_token_once(lengths: list[int], size: int) -> None:
    total = sum(lengths)
    x = torch.arange(1, total + 1, dtype=torch.float64)[None, :, None].requires_grad_()
    layout = ChunkLayout.of(1, total, Sequences(tuple(lengths)), size)
    segments = [slice(0, 1), slice(1, len(layout.active))] if len(layout.active) > 1 else [slice(0, 1)]
    parts = layout.split(x[..., None], segments)
    assert sum(part.shape[0] for part in parts) == sum(layout.active)
    assert all(part.shape[1:] == (1, layout.size, 1) for part in parts)
    joined = layout.join(parts, segments, total)[..., 0]
    assert torch.equal(joined, x)
    joined.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_sequences() -> None:
    seqs = Sequences.from_cu_seqlens(torch.tensor([0, 2, 5, 6]))
    assert seqs == Sequences((2, 3, 1))
    assert seqs.cu_seqlens().tolist() == [0, 2, 5, 6]
    assert seqs.positions().tolist() == [0, 1, 0, 1, 2, 0]
    assert seqs.indices().tolist() == [0, 0, 1, 1, 1, 2]
    assert (seqs.count, seqs.total, seqs.max_length) == (3, 6, 3)
    empty = Sequences.from_cu_seqlens([0, 0, 2, 2, 3])
    assert (empty.lengths, empty.occupied, empty.starts) == ((0, 2, 0, 1), (2, 1), (0, 0, 2, 2))
    assert empty.positions().tolist() == [0, 1, 0]
    assert empty.indices().tolist() == [1, 1, 3]
    for bad in ([], [0], [1, 2], [0, 3, 2]):
        with pytest.raises(ShapeError):
            Sequences.from_cu_seqlens(bad)
