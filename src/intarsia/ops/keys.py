"""What the queries of several sequences look at: one tensor, a tensor of each sequence, or pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ShapeError


class BlockTable:
    """Where the entries of each sequence of a batch lie in pages: entry i of sequence n at place `i % page_size` of
    page `pages[n, i // page_size]`. Made once for a batch, it serves all pools that share it; it never changes.

    Attributes:
        pages: `[N, most]`, int64; -1 where a sequence has no page.
        lengths: how many entries each sequence has, those that are no longer held among them.
        first: the first entry of each sequence that is still held.
        highest: the highest page that a sequence lies in.
    """

    def __init__(
        self,
        pages: Tensor | Sequence[Sequence[int]],
        lengths: Sequence[int],
        page_size: int,
        first: Sequence[int] | None = None,
    ) -> None:
        """
        Raises:
            ShapeError: an entry that is held lies in no page.
        """
        if not isinstance(pages, Tensor):
            most = max((len(row) for row in pages), default=0)
            pages = torch.tensor([[*row, *[-1] * (most - len(row))] for row in pages], dtype=torch.int64)
        self.pages, self.page_size = pages, page_size
        self.lengths = tuple(lengths)
        self.first = (0,) * len(self.lengths) if first is None else tuple(first)
        self._check()
        self.highest = int(pages.max()) if pages.numel() else -1

    def to(self, device: torch.device | str) -> BlockTable:
        """The table on another device."""
        pages = self.pages.to(device)
        if pages is self.pages:
            return self
        return self._with(pages=pages)

    def strided(self, stride: int) -> BlockTable:
        """Where entries of which each stands for `stride` tokens lie, in the page of its last token: as many to a page
        as it holds strides, or one where a stride is of whole pages. None of them has been given back."""
        if stride == 1:
            return self
        size, lengths = self.page_size, [n // stride for n in self.lengths]
        if stride <= size:
            return BlockTable(self.pages, lengths, size // stride)
        return BlockTable(self.pages[:, stride // size - 1 :: stride // size], lengths, 1)

    def held_from(self, entry: int) -> BlockTable:
        """The table of those entries alone that are not before `entry`."""
        first = tuple(
            max(begin, min(entry, length)) for begin, length in zip(self.first, self.lengths, strict=True)
        )
        return self._with(first=first)

    def rows(self, numbers: Sequence[int]) -> BlockTable:
        """The table of these sequences alone."""
        lengths, first = (tuple(each[n] for n in numbers) for each in (self.lengths, self.first))
        return self._with(pages=self.pages[list(numbers)], lengths=lengths, first=first)

    def places(self, numbers: Sequence[int], begins: Sequence[int], size: int) -> Tensor:
        """Where `size` entries of each of the sequences `numbers` from its entry `begins` on lie in the pages laid end
        to end, `[len(numbers), size]`; of an entry before the first some place that is there."""
        device = self.pages.device
        entries = torch.tensor(begins, device=device)[:, None] + torch.arange(size, device=device)
        entries = entries.maximum(torch.tensor([self.first[n] for n in numbers], device=device)[:, None])
        rows = torch.tensor(numbers, device=device)[:, None]
        return self.pages[rows, entries // self.page_size] * self.page_size + entries % self.page_size

    def _with(self, **changed: object) -> BlockTable:
        """The table with something else in places that need no check."""
        moved = BlockTable.__new__(BlockTable)
        vars(moved).update(vars(self), **changed)
        return moved

    def _check(self) -> None:
        if self.page_size < 1:
            raise ShapeError(f"a page has room for one entry at least; got {self.page_size}")
        if self.pages.dim() != 2 or self.pages.dtype != torch.int64:
            raise ShapeError(
                f"the pages of a block table are [N, most] int64; got {list(self.pages.shape)} {self.pages.dtype}"
            )
        if not self.pages.shape[0] == len(self.lengths) == len(self.first):
            raise ShapeError(
                f"a block table has pages, a length and a first entry of each sequence; got "
                f"{self.pages.shape[0]}, {len(self.lengths)} and {len(self.first)}"
            )
        longest = self.pages.shape[1] * self.page_size
        for n, (begin, length) in enumerate(zip(self.first, self.lengths, strict=True)):
            if not 0 <= begin <= length:
                raise ShapeError(f"sequence {n} holds the entries from {begin} on and has {length}")
            if length > longest:
                raise ShapeError(
                    f"sequence {n} has {length} entries, and its pages have room for {longest}: "
                    f"{self.pages.shape[1]} of {self.page_size}"
                )
        # One look at all of them: a table may be long.
        if any(self.lengths):
            device = self.pages.device
            column = torch.arange(self.pages.shape[1], device=device) * self.page_size
            begins, ends = (torch.tensor(x, device=device)[:, None] for x in (self.first, self.lengths))
            held = (column + self.page_size > begins) & (column < ends)
            if bool((held & (self.pages < 0)).any()):
                n, page = (held & (self.pages < 0)).nonzero()[0].tolist()
                raise ShapeError(
                    f"the entries of sequence {n} from {page * self.page_size} on lie in no page of the table"
                )


@dataclass(frozen=True)
class Paged:
    """Entries of several sequences in pages that sequences take as they grow.

    Raises:
        ShapeError: the table points to a page that is not there, or is for pages of another size.
    """

    pages: Tensor
    """`[pages, page_size, ...]`."""
    table: BlockTable

    def __post_init__(self) -> None:
        if self.pages.dim() < 2 or self.pages.shape[1] != self.table.page_size:
            raise ShapeError(
                f"the block table is for pages of {self.table.page_size} entries; the pages are "
                f"{list(self.pages.shape)}, which should be [pages, page_size, ...]"
            )
        if self.table.highest >= self.pages.shape[0]:
            raise ShapeError(
                f"the block table points to page {self.table.highest}; there are {self.pages.shape[0]}"
            )
        object.__setattr__(self, "table", self.table.to(self.pages.device))


Keys = Tensor | tuple[Tensor, ...] | Paged
"""What each of several sequences can be looked up in: `[B, S, ...]` of sequences of one length; `[1, S_n, ...]` of each
sequence; or pages."""


def as_heads(latents: Keys, channels: int | None = None) -> Keys:
    """Entries of one row of numbers as the keys of one head, or their first channels: views."""
    if isinstance(latents, Paged):
        return Paged(latents.pages[..., None, :channels], latents.table)
    if isinstance(latents, tuple):
        return tuple(x[..., None, :channels] for x in latents)
    return latents[..., None, :channels]


def count_of(keys: Keys) -> int:
    """The number of sequences."""
    if isinstance(keys, Paged):
        return len(keys.table.lengths)
    return len(keys) if isinstance(keys, tuple) else keys.shape[0]


def lengths_of(keys: Keys) -> tuple[int, ...]:
    """How many entries each sequence has."""
    if isinstance(keys, Paged):
        return keys.table.lengths
    if isinstance(keys, tuple):
        return tuple(x.shape[1] for x in keys)
    return (keys.shape[1],) * keys.shape[0]


def entry_of(keys: Keys) -> Tensor:
    """A tensor whose dtype, device and shape behind the first two dimensions are those of the entries."""
    if isinstance(keys, Paged):
        return keys.pages
    return keys[0] if isinstance(keys, tuple) else keys


def rows_of(keys: Keys, numbers: Sequence[int]) -> Keys:
    """The entries of these sequences, as they lie."""
    if isinstance(keys, Paged):
        return Paged(keys.pages, keys.table.rows(numbers))
    return tuple(keys[n] for n in numbers) if isinstance(keys, tuple) else keys[list(numbers)]


def row_of(keys: Keys, n: int, last: int | None = None) -> Tensor:
    """The entries of sequence n, `[1, S_n, ...]`, or the `last` of them: a view, or of pages a copy."""
    if not isinstance(keys, Paged):
        row = keys[n] if isinstance(keys, tuple) else keys[n : n + 1]
        return row if last is None else row[:, max(row.shape[1] - last, 0) :]
    table, size = keys.table, keys.table.page_size
    end = table.lengths[n]
    begin = table.first[n] if last is None else max(table.first[n], end - last)
    pages = table.pages[n, begin // size : -(-end // size)]
    skipped = begin // size * size
    return keys.pages.index_select(0, pages).flatten(0, 1)[None, begin - skipped : end - skipped]


def between(keys: Keys, n: int, begin: int, end: int) -> Tensor:
    """The entries `begin` .. `end` of sequence n, all of them held, `[1, end - begin, ...]`: a view, or of pages a
    copy."""
    if not isinstance(keys, Paged):
        return row_of(keys, n)[:, begin:end]
    table, size = keys.table, keys.table.page_size
    found = keys.pages.index_select(0, table.pages[n, begin // size : -(-end // size)]).flatten(0, 1)
    skipped = begin // size * size
    return found[None, begin - skipped : end - skipped]


def right_aligned(keys: Keys, numbers: Sequence[int], size: int) -> Tensor:
    """The last `size` entries of the sequences `numbers`, `[len(numbers), size, ...]`: one that has fewer has zeros in
    front of them."""
    lengths = lengths_of(keys)
    missing = [max(size - lengths[n], 0) for n in numbers]
    if not isinstance(keys, Paged):
        rows = [row_of(keys, n, size) for n in numbers]
        room = [0, 0] * (rows[0].dim() - 2)
        return torch.cat([F.pad(row, (*room, gap, 0)) for row, gap in zip(rows, missing, strict=True)])
    places = keys.table.places(numbers, [lengths[n] - size for n in numbers], size)
    found = keys.pages.flatten(0, 1)[places]
    if any(missing):
        # Whatever stands in those places is no number that a product may meet.
        absent = torch.arange(size, device=found.device) < torch.tensor(missing, device=found.device)[:, None]
        found = found.masked_fill(absent.view(*absent.shape, *[1] * (found.dim() - 2)), 0)
    return found
