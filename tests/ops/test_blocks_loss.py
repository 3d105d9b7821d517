"""What an indexer of blocks is trained by, and how much of attention stands in what was picked: against float64
references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops import Sequences, blocks_loss, blocks_loss_torch, pick_blocks, picked_share
from support.budget import assert_within_budget
from support.device import device
from support.losses import check_loss_and_gradients, normal

D, H, K = 4, 4, 8
NAMES = ("index_q", "index_k", "q", "k")
LENGTHS = (11, 0, 17, 2)


def inputs(B: int, T: int, groups: int = 2, heads: int = 2, seed: int = 0) -> dict[str, Tensor]:
    shapes = ((groups, D), (D,), (H, K), (heads, K))
    return {
        name: normal(B, T, *x, seed=seed + n) for n, (name, x) in enumerate(zip(NAMES, shapes, strict=True))
    }


def picks(x: dict[str, Tensor], block: int, seqs: Sequences | None = None) -> Tensor:
    index = (x["index_q"].detach(), x["index_k"].detach()[:, :, None])
    return pick_blocks(*index, count=2, block=block, cu_seqlens=seqs)


@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("groups", "heads", "block"), [(2, 2, 4), (4, 1, 4), (1, 2, 3), (2, 4, 1)])
def test_loss_and_gradients_are_those_of_the_reference(
    groups: int,
    heads: int,
    block: int,
    packed: bool,
    sparse: bool,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all queries at once, and of one after the other."""
    monkeypatch.setattr(blocks_loss_torch, "ROOM", room)
    seqs = Sequences(LENGTHS) if packed else None
    x = {n: t.requires_grad_() for n, t in inputs(1 if packed else 2, 30, groups, heads).items()}
    options: dict[str, Any] = {"block": block, "scale": 0.6, "index_scale": 0.9, "cu_seqlens": seqs}
    options["picked"] = picks(x, block, seqs) if sparse else None
    check_loss_and_gradients(blocks_loss, x, **options)


def test_of_blocks_of_one_token_the_gradient_is_the_difference_of_the_distributions() -> None:
    T = 12
    x = inputs(1, T, groups=1)
    x["index_q"].requires_grad_()
    (grad,) = torch.autograd.grad(blocks_loss(**x, block=1, index_scale=1.0).sum(), x["index_q"])
    hidden = torch.ones(T, T, dtype=torch.bool, device=device()).triu(1)
    index_k = x["index_k"][0]
    told = (x["index_q"][0, :, 0] @ index_k.T).masked_fill(hidden, -torch.inf).softmax(-1)
    logits = torch.einsum("thk,shk->hts", x["q"][0], x["k"][0].repeat_interleave(2, 1)) * K**-0.5
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(grad[0, :, 0], (told - p) @ index_k, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_keeps_the_error_budget(dtype: torch.dtype, sparse: bool, trial: int) -> None:
    x = inputs(1, 60, seed=trial)
    picked = picks(x, 8) if sparse else None

    def run(impl: str, **x: Tensor) -> list[Tensor]:
        return [blocks_loss(**x, picked=picked, block=8, impl=impl)]

    # Scores; logits; a softmax of each and the sum of both.
    assert_within_budget(
        lambda **x: run("auto", **x), lambda **x: run("reference", **x), x, dtype, stages=4, inside=True
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("groups", "heads", "block"), [(1, 2, 1), (2, 2, 4), (4, 1, 3)])
def test_the_share_of_attention_that_was_picked(groups: int, heads: int, block: int, packed: bool) -> None:
    seqs = Sequences(LENGTHS) if packed else None
    x = inputs(1, 30, groups, heads)
    picked = picks(x, block, seqs)
    share, chosen = picked_share(x["q"], x["k"], picked, block=block, scale=0.7, cu_seqlens=seqs)
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))] if packed else [0]
    for t in range(30):
        first = max(start for start in starts if start <= t)
        shares, less = [], False
        for h in range(H):
            k = x["k"][0, first : t + 1, h // (H // heads)]
            weights = (k @ x["q"][0, t, h] * 0.7).softmax(0)
            blocks = set(picked[0, t, h // (H // groups)].tolist())
            mine = [s for s in range(len(weights)) if s // block in blocks]
            less |= len(mine) < len(weights)
            shares.append(weights[mine].sum())
        torch.testing.assert_close(share[0, t], torch.stack(shares).mean(), rtol=1e-10, atol=1e-12)
        assert bool(chosen[0, t]) == less


def test_of_everything_nothing_is_missed() -> None:
    x = inputs(2, 9)
    picked = torch.arange(3, dtype=torch.int32, device=device()).expand(2, 9, 1, 3)
    share, chosen = picked_share(x["q"], x["k"], picked, block=3)
    torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-12)
    assert not chosen.any()


def test_wrong_arguments_are_named() -> None:
    x = inputs(2, 5)
    for changes, match in (
        ({"index_k": x["index_k"][:, 1:]}, "index_k must be"),
        ({"index_q": x["index_q"].repeat(1, 1, 2, 1)[:, :, :3]}, "groups that divide"),
        ({"q": x["q"][:, 1:]}, "q must be"),
        ({"k": x["k"][..., 1:]}, "channels of q"),
        ({"picked": torch.zeros(2, 5, 1, 3, dtype=torch.int32, device=device())}, "2 groups"),
    ):
        with pytest.raises(ShapeError, match=match):
            blocks_loss(**{**x, **changes}, block=2)
    with pytest.raises(ConfigError, match="at least 1"):
        blocks_loss(**x, block=0)
    picked = torch.zeros(2, 5, 3, 1, dtype=torch.int32, device=device())
    with pytest.raises(ShapeError, match="divide the 4 heads"):
        picked_share(x["q"], x["k"], picked)
    with pytest.raises(ShapeError, match="k must be"):
        picked_share(x["q"], x["k"][:, 1:], picked[:, :, :1])
