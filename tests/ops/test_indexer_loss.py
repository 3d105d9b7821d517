"""What an indexer is trained by, against its float64 reference and against the gradient that is known of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops import Sequences, indexer_loss, indexer_loss_torch, lightning_indexer
from support.budget import assert_within_budget
from support.device import device
from support.losses import check_loss_and_gradients, normal

HI, D, H, HKV, K = 3, 4, 4, 2, 8
NAMES = ("index_q", "index_k", "index_weights", "q", "k")


def inputs(B: int, T: int, seed: int = 0) -> dict[str, Tensor]:
    shapes = ((HI, D), (D,), (HI,), (H, K), (HKV, K))
    return {
        name: normal(B, T, *x, seed=seed + n) for n, (name, x) in enumerate(zip(NAMES, shapes, strict=True))
    }


def picks(x: dict[str, Tensor], count: int, seqs: Sequences | None = None) -> Tensor:
    return lightning_indexer(x["index_q"], x["index_k"], x["index_weights"], count=count, cu_seqlens=seqs)


@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_the_reference(
    packed: bool, count: int | None, relu: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all queries at once, and of one after the other."""
    monkeypatch.setattr(indexer_loss_torch, "ROOM", room)
    seqs = Sequences((11, 0, 19)) if packed else None
    x = {name: tensor.requires_grad_() for name, tensor in inputs(1 if packed else 2, 30).items()}
    options: dict[str, Any] = {"relu": relu, "scale": 0.6, "cu_seqlens": seqs}
    options["picked"] = None if count is None else picks(x, count, seqs)
    check_loss_and_gradients(indexer_loss, x, **options)


@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_of_blocks_and_gradients_are_those_of_the_reference(
    packed: bool, count: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer_loss_torch, "ROOM", room)
    lengths, block = (11, 0, 17, 2), 4
    seqs = Sequences(lengths) if packed else None
    x = inputs(1 if packed else 2, 30)
    x["index_k"] = x["index_k"][:, : sum(n // block for n in lengths) if packed else 30 // block]
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    options: dict[str, Any] = {"block": block, "scale": 0.6, "cu_seqlens": seqs}
    if count is not None:
        keys = x["index_k"].split([n // block for n in lengths], dim=1) if packed else x["index_k"]
        options["picked"] = lightning_indexer(
            x["index_q"], keys, x["index_weights"], count=count, block=block,
            tokens=lengths if packed else (30, 30), cu_seqlens=seqs,
        )  # fmt: skip
    found = []
    for impl in ("auto", "reference"):
        loss = indexer_loss(**x, **options, impl=impl)
        grads = torch.autograd.grad(
            (loss * normal(*loss.shape, seed=9)).sum(), list(x.values())[:3], materialize_grads=True
        )
        found.append((loss, grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    assert (found[0][0][:, : block - 1] == 0).all()
    for name, got, expected in zip(NAMES, *(grads for _, grads in found), strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradient_is_the_difference_of_the_distributions() -> None:
    """`dI = softmax(I) - p` (V3.2's report): with one head of weight 1 and no ReLU the scores are products."""
    T = 12
    index_q, index_k = normal(1, T, 1, D).requires_grad_(), normal(1, T, D, seed=1)
    q, k = normal(1, T, H, K, seed=2), normal(1, T, HKV, K, seed=3)
    ones = torch.ones(1, T, 1, dtype=torch.float64, device=device())
    loss = indexer_loss(index_q, index_k, ones, q, k, relu=False, index_scale=1.0)
    (grad,) = torch.autograd.grad(loss.sum(), index_q)
    hidden = torch.ones(T, T, dtype=torch.bool, device=device()).triu(1)
    scores = (index_q[0, :, 0] @ index_k[0].T).masked_fill(hidden, -torch.inf).softmax(-1)
    logits = torch.einsum("thk,shk->hts", q[0], k[0].repeat_interleave(H // HKV, 1)) * K**-0.5
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(grad[0, :, 0], (scores - p) @ index_k[0], rtol=1e-9, atol=1e-11)


def test_it_is_zero_where_both_agree() -> None:
    T = 20
    q, k = normal(1, T, 1, K), normal(1, T, 1, K, seed=1)
    ones = torch.ones(1, T, 1, dtype=torch.float64, device=device())
    loss = indexer_loss(q, k[:, :, 0], ones, q, k, relu=False)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [None, 9])
def test_keeps_the_error_budget(dtype: torch.dtype, count: int | None, trial: int) -> None:
    x = inputs(1, 60, trial)
    picked = None if count is None else picks(x, count)

    def run(impl: str, **x: Tensor) -> list[Tensor]:
        return [indexer_loss(**x, picked=picked, impl=impl)]

    # Scores and their weighted sum; logits; a softmax of each and the sum of both.
    assert_within_budget(
        lambda **x: run("auto", **x), lambda **x: run("reference", **x), x, dtype, stages=4, inside=True
    )


def test_wrong_arguments_are_named() -> None:
    x = inputs(2, 5)
    for changes, match in (
        ({"index_k": x["index_k"][:, 1:]}, "a key for each query"),
        ({"q": x["q"][:, 1:]}, "q must be"),
        ({"k": x["k"][..., 1:]}, "channels of q"),
        ({"picked": torch.zeros(2, 5, 2, 3, dtype=torch.int32, device=device())}, "one group"),
    ):
        with pytest.raises(ShapeError, match=match):
            indexer_loss(**{**x, **changes})
