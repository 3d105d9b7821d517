"""Softmax attention of one token of each sequence where the host may know nothing of them: for steps that are recorded.

A recorded step (a CUDA graph) does the same with the same memory whenever it is played. So where the keys lie and how
many there are stands in tensors, and what is looked at is as large as it can get, with a mask. Nothing here waits for
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.ops.absorbed import absorbed
from intarsia.ops.attention_torch import _attend


@dataclass(frozen=True)
class Room:
    """Entries of N sequences in pages, the last of them the token's own.

    Raises:
        ShapeError: the tensors do not fit together.
    """

    pages: Tensor
    """`[pages, page_size, ...]`."""
    table: Tensor
    """`[N, columns]` int64: entry i of sequence n lies at place `i % page_size` of page `table[n, i // page_size]`."""
    lengths: Tensor
    """`[N]` int64: how many entries there are, at least one and no more than the table has room for."""

    def __post_init__(self) -> None:
        fits = self.pages.dim() >= 3 and self.table.dim() == 2 and self.lengths.shape == self.table.shape[:1]
        if not fits or not self.table.dtype == self.lengths.dtype == torch.int64:
            raise ShapeError(
                "entries are [pages, page_size, ...], with a table [N, columns] and lengths [N] of int64; got "
                f"{list(self.pages.shape)}, {list(self.table.shape)} {self.table.dtype} and "
                f"{list(self.lengths.shape)} {self.lengths.dtype}"
            )

    def __getitem__(self, index: object) -> NoReturn:
        raise UnsupportedError("a layer that looks at one sequence after the other cannot be recorded")

    def last(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The last entries of each sequence as far as there is room for any, or a window's, `[N, size, ...]`, the
        newest at the end and zeros before the first; and which of them are there, `[N, size]` bool."""
        page_size = self.pages.shape[1]
        size = self.table.shape[1] * page_size
        size = size if window is None else min(size, window)
        entries = self.lengths[:, None] - size + torch.arange(size, device=self.table.device)
        there = entries >= 0
        entries = entries.clamp(min=0)
        pages = self.table.gather(1, entries // page_size).clamp(min=0)
        found = self.pages.flatten(0, 1)[pages * page_size + entries % page_size]
        # Whatever stands in the place of one that is not there is no number that a product may meet.
        return found.masked_fill(~there.view(*there.shape, *[1] * (found.dim() - 2)), 0), there


def attention_in_room(
    q: Tensor, k: Room, v: Room, *, scale: float | None, window: int | None, sinks: Tensor | None
) -> Tensor:
    """`softmax_attention` of one query `[N, 1, H, K]` of each sequence."""
    _check(q, k)
    (keys, there), (values, _) = k.last(window), v.last(window)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _attend(q, keys.to(q.dtype), values.to(q.dtype), there[:, None, None], scale=scale, sinks=sinks)


def latent_attention_in_room(q: Tensor, latents: Room, up: Tensor, *, scale: float | None) -> Tensor:
    """`latent_attention` of one query `[N, 1, H, K]` of each sequence."""
    _check(q, latents)
    rank = up.shape[2]
    own = q.shape[3] - (latents.pages.shape[2] - rank)
    read, there = latents.last(None)
    keys = read.to(q.dtype).unsqueeze(2)
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def attend(wide: Tensor) -> Tensor:
        return _attend(wide, keys, keys[..., :rank], there[:, None, None], scale=scale, sinks=None)

    return absorbed(q, up, own, attend)


def _check(q: Tensor, k: Room) -> None:
    if q.shape[:2] != (k.table.shape[0], 1):
        raise UnsupportedError(
            f"a recorded step takes one token of each of {k.table.shape[0]} sequences; got {list(q.shape[:2])}"
        )
