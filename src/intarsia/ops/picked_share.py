"""How much of what full attention would give stands in what was picked: a measure, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops.attention_call import sequences_in
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import check_picked
from intarsia.ops.uncompiled import Uncompiled

ROOM = 1 << 22
"""So many weights are there at a time, or those of one query."""


@torch.no_grad()
def picked_share(
    q: Tensor,
    k: Tensor,
    picked: Tensor,
    *,
    block: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each query the share of full attention's weights that what it picked has, the mean over heads: 1 where nothing
    is missed. All pairs are looked at, a block of queries at a time.

    Args:
        q, k: of attention, `[B, T, H, K]` and `[B, T, HKV, K]`, H a multiple of HKV.
        picked, block: as in `sparse_attention`.
        scale, cu_seqlens: as in `softmax_attention`.

    Returns:
        The shares `[B, T]` float32 (float64 for float64), and `[B, T]` bool: where a group of heads has picked less
        than there is, so that its share says something.

    Raises:
        ShapeError: arguments that do not fit together.
    """
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"k must be [B, T, heads, K] as q, of heads that divide its own; got {list(k.shape)} for {list(q.shape)}"
        )
    check_picked(picked, q, block)
    if q.shape[2] % picked.shape[2]:
        raise ShapeError(
            f"picked must be of groups that divide the {q.shape[2]} heads; got {list(picked.shape)}"
        )
    seqs = sequences_in(q, cu_seqlens)
    lengths = (q.shape[1],) if seqs is None else seqs.lengths
    numbers = (block, q.shape[3] ** -0.5 if scale is None else scale)
    share, chosen = _SHARES((q.detach(), k.detach(), picked), lengths, numbers)
    return share, chosen


def _of_sequences(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    occupied = [n for n in lengths if n]
    q, k, picked = (x.split(occupied, dim=1) for x in tensors if x is not None)
    found = [_of_one(*part, int(numbers[0]), numbers[1]) for part in zip(q, k, picked, strict=True)]
    return [torch.cat(each, dim=1) for each in zip(*found, strict=True)]


def _of_one(q: Tensor, k: Tensor, picked: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Both `[B, T]`, of sequences of one length."""
    wide = compute_dtype(q, k)
    (B, T, H), G = q.shape[:3], picked.shape[2]
    q, k = q.to(wide).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4), k.to(wide).transpose(1, 2)
    rows, blocks = max(ROOM // (B * H * T), 1), -(-T // block)
    shares, chosen = [], []
    with without_autocast(q):
        for begin in range(0, T, rows):
            end = min(begin + rows, T)
            seen = torch.arange(T, device=q.device) <= torch.arange(begin, end, device=q.device)[:, None]
            logits = q[:, :, :, begin:end] @ k[:, :, None].mT * scale
            weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1).flatten(1, 2)
            number = picked[:, begin:end].transpose(1, 2).long()
            # A place more for what stands for nothing.
            read = torch.zeros(*number.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
            read = read.scatter(-1, number.where(number >= 0, blocks), True)[..., :blocks]
            read = read.repeat_interleave(block, dim=-1)[..., :T] & seen
            shares.append((weights.unflatten(1, (G, -1)) * read[:, :, None]).sum(-1).mean(dim=(1, 2)))
            chosen.append((read.sum(-1) < seen.sum(-1)).any(1))
    return torch.cat(shares, dim=1), torch.cat(chosen, dim=1)


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q, k = tensors[:2]
    assert q is not None
    assert k is not None
    return [
        q.new_empty(q.shape[:2], dtype=compute_dtype(q, k)),
        q.new_empty(q.shape[:2], dtype=torch.bool),
    ]


_SHARES = Uncompiled("picked_share", 3, 2, _of_sequences, _room)
