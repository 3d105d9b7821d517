"""Batches as other libraries give them, rows with padding, as what Intarsia's models take: tokens alone.

A padded place is not computed. So it enters no state, no convolution and no softmax, on whichever side it stands, and a
row gives what its tokens give alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.model.loss import IGNORED
from intarsia.ops import Sequences


@dataclass(frozen=True)
class Places:
    """Which places of a batch of rows `[B, T]` hold tokens, and which tokens follow each other."""

    held: Tensor
    """`[B, T]` bool."""
    begins: Tensor | None = None
    """`[B, T]` bool, the tokens with which a sequence begins, where a row has several."""

    @cached_property
    def seqs(self) -> Sequences | None:
        """The sequences of the row that `row` makes, those of a batch's first row first; None where it makes none."""
        if self.is_whole:
            return None
        if self.begins is None:
            return Sequences(tuple(self.held.sum(1).tolist()))
        first = self.begins[self.held].nonzero().flatten().tolist()
        edges = [*first, int(self.held.sum())]
        return Sequences(tuple(b - a for a, b in pairwise(edges)))

    @cached_property
    def is_whole(self) -> bool:
        """Whether every place holds a token, and every row one sequence."""
        return self.begins is None and bool(self.held.all())

    def after(self, earlier: Tensor) -> Places:
        """The same with the places `earlier` `[B, n]` in front."""
        return Places(torch.cat([earlier, self.held], dim=1))

    def row(self, x: Tensor) -> Tensor:
        """What stands at the tokens of `x` `[B, T]`, end to end, `[1, N]`; or `x` where all places hold one."""
        return x if self.is_whole else x[self.held][None]

    def spread(self, x: Tensor, before: Tensor | None, wanted: slice | Tensor) -> Tensor:
        """What was computed for each token, `[1, N, D]` or `[B, T, D]`, at the `wanted` columns of the batch. A padded
        place has what the last token before it has, in an earlier call `before` `[B, D]`; without one, zeros."""
        if self.is_whole:
            return x[:, wanted]
        earlier = x.new_zeros(self.held.shape[0], x.shape[-1]) if before is None else before.to(x.dtype)
        count = self.held.flatten().cumsum(0).view_as(self.held)[:, wanted]
        some = (self.held.cumsum(1) > 0)[:, wanted]
        rows = torch.arange(self.held.shape[0], device=x.device)[:, None]
        where = torch.where(some, count - 1 + len(rows), rows)
        return torch.cat([earlier, x[0]])[where]

    def targets(self, labels: Tensor) -> Tensor:
        """The token to be predicted after each token, `[1, N]` or `[B, T]`: its sequence's next, as far as `labels`
        `[B, T]` want it."""
        following = self.held.new_zeros(self.held.shape)
        following[:, :-1] = (
            self.held[:, 1:] if self.begins is None else self.held[:, 1:] & ~self.begins[:, 1:]
        )
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        return self.row(shifted.masked_fill(~following, IGNORED))


def places_of(
    shape: Sequence[int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    before: Tensor | None = None,
) -> Places:
    """Where the tokens of a batch `[B, T]` are.

    Args:
        attention_mask: `[B, columns + T]`, 0 where there is no token; all that were read before come first.
        position_ids: `[B, T]` or `[1, T]`, which place in its sequence each token has. With nothing before, a row may
            hold several sequences: each begins at 0.
        before: `[B, columns]` bool, the places that were read before.

    Raises:
        ShapeError: the mask is not of these places, or is not what it was of those before.
        UnsupportedError: a mask of pairs; positions that leave tokens out.
    """
    held = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    if attention_mask is not None:
        held = _held(attention_mask.to(device), held, before)
    if position_ids is None:
        return Places(held)
    if position_ids.dim() != 2 or position_ids.shape[1] != held.shape[1]:
        raise ShapeError(
            f"position_ids must be [B, T], of the {held.shape[1]} tokens of this call; got {list(position_ids.shape)}"
        )
    positions = position_ids.to(device).expand(held.shape)
    # Of the past tokens of a sequence and of those of this call, how many stand before each.
    seen = 0 if before is None else before.sum(1, keepdim=True)
    place = held.cumsum(1) - 1
    if bool((positions == place + seen)[held].all()):
        return Places(held)
    if before is not None:
        raise UnsupportedError(
            "position_ids must count the tokens of each sequence from 0, padding left out, and go on from what the "
            "cache has read: leave them out, they are made here"
        )
    # Only differences of positions matter: in a padded row they may count the padding in front.
    begins = held & ((positions == 0) | (place == 0))
    offset = positions - place
    started = (
        torch.where(begins, torch.arange(held.shape[1], device=device), -1).cummax(1).values.clamp(min=0)
    )
    if not bool((offset == offset.gather(1, started))[held].all()):
        raise UnsupportedError(
            "position_ids must go up by one from token to token, or begin a new sequence at 0, padding left out"
        )
    several = bool((begins & (place > 0)).any())
    return Places(held, begins if several else None)


def positions_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """`[1, total]`, each token's place in its own sequence, of cumulative lengths."""
    seqs = Sequences.from_cu_seqlens(cu_seqlens)
    if seqs.total != total:
        raise ShapeError(f"cu_seq_lens_q ends at {seqs.total} and the row has {total} tokens")
    return seqs.positions(cu_seqlens.device)[None]


def _held(mask: Tensor, held: Tensor, before: Tensor | None) -> Tensor:
    if mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask must be [B, T], 0 where there is no token; a mask of pairs of tokens {list(mask.shape)} "
            "has no meaning for linear attention"
        )
    columns = 0 if before is None else before.shape[1]
    if mask.shape != (held.shape[0], columns + held.shape[1]):
        raise ShapeError(
            f"attention_mask must be [{held.shape[0]}, {columns + held.shape[1]}], the {columns} places that the "
            f"cache has read and the {held.shape[1]} of this call; got {list(mask.shape)}"
        )
    if before is not None and not torch.equal(mask[:, :columns] != 0, before):
        raise ShapeError(
            "attention_mask is not what it was for places that the cache has read: what is in a state stays in it"
        )
    return mask[:, columns:] != 0
