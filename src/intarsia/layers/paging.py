"""Which pages of a pool belong to which sequence: numbers alone, no content.

A sequence takes pages as it grows and shares those that it has in common with another; a page that is shared is copied
before one of them writes to it. In a window, pages that no token to come can see are given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import ConfigError, PoolError
from intarsia.ops.keys import BlockTable
from intarsia.ops.sequences import placed

FIRST_COLUMNS = 16
"""The pages of a sequence for which the table has room at first."""


@dataclass(frozen=True)
class PageStep:
    """Where new tokens of some sequences go."""

    table: BlockTable
    """Of the sequences after the tokens."""
    places: Tensor
    """Where each new token is written, in the pages laid end to end, `[kept]`, one sequence after the other."""
    kept: Tensor | None
    """Which of the new tokens are written, `[kept]`; None: all. What a window has left behind already is not."""
    copies: tuple[tuple[int, int], ...]
    """The pages to copy before anything is written: from one, to another."""

    def to(self, device: torch.device) -> PageStep:
        """The same on another device."""
        kept = None if self.kept is None else placed(self.kept, device)
        return PageStep(self.table.to(device), placed(self.places, device), kept, self.copies)


@dataclass(frozen=True)
class _Plan:
    """What a sequence does to its pages in a step: let go of those before `column`, take copies of those in the columns
    `shared`, and hold its entries from `start`, the first that is written, to `end`."""

    slot: int
    start: int
    end: int
    column: int
    shared: list[int]


class Paging:
    """The pages of a pool and the sequences in its slots.

    Attributes:
        pages, page_size: how many pages there are, and the tokens that fit in one.
        window: of how many tokens a sequence keeps entries, the newest among them; None: all.
        rewrites: whether every token writes entries of all tokens anew.
    """

    def __init__(
        self, pages: int, page_size: int, slots: int, window: int | None = None, rewrites: bool = False
    ) -> None:
        if min(pages, page_size, slots) < 1:
            raise ConfigError(
                f"a pool needs a page, room in it and a slot; got {pages} pages of {page_size} and {slots} slots"
            )
        self.pages, self.page_size, self.window, self.rewrites = pages, page_size, window, rewrites
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._shared_users = 0  # how many more sequences hold pages than there are pages held
        # What the next step was found to do when its room was asked for; of no use when anything has changed.
        self._planned: tuple[tuple[Sequence[int], ...], list[_Plan]] | None = None
        # A row for each slot; its pages stand from `_first` to `_end`, and of its entries those from `_begin` on.
        self._table = torch.full((slots, FIRST_COLUMNS), -1, dtype=torch.int64)
        self._first, self._end, self._begin = [0] * slots, [0] * slots, [0] * slots

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def own(self, slot: int) -> list[int]:
        """The pages of a slot's sequence."""
        return self._table[slot, self._first[slot] : self._end[slot]].tolist()

    def held(self, slots: Sequence[int]) -> int:
        """How many pages the sequences of these slots have together; one that they share is one."""
        pages = torch.unique(self._table[list(slots)])
        return int((pages >= 0).sum())

    def has_own(self, slot: int) -> bool:
        """Whether a slot's sequence has a page that no other has."""
        return any(self._users[page] == 1 for page in self.own(slot))

    def most_pages(self, tokens: int) -> int:
        """The pages that a sequence of so many tokens has, at most."""
        kept = tokens if self.window is None else min(tokens, self.window + self.page_size)
        return self._pages_for(kept) + (self.window is not None and kept < tokens)

    def pages_of(self, slots: Sequence[int]) -> Tensor:
        """The pages that sequences have now, `[N, most]`; -1 where there is none."""
        return self._table[list(slots), : max(self._end[slot] for slot in slots)]

    def table(self, pages: Tensor, tokens: Sequence[int]) -> BlockTable:
        """Where the entries of sequences of so many tokens lie, which have these `pages`."""
        first = None if self.window is None else [self._held_from(n) for n in tokens]
        return BlockTable(pages, tokens, self.page_size, first)

    def check_room(self, slots: Sequence[int], before: Sequence[int], lengths: Sequence[int]) -> None:
        """Raise PoolError unless the next `lengths` tokens of sequences that have seen `before` find room."""
        self._plan(slots, before, lengths)

    def step(self, slots: Sequence[int], before: Sequence[int], lengths: Sequence[int]) -> PageStep:
        """Take the pages that the next `lengths` tokens of sequences need which have seen `before`.

        Raises:
            PoolError: there are not so many pages. None has been taken then.
        """
        plans = self._plan(slots, before, lengths)
        self._planned = None
        copies: list[tuple[int, int]] = []
        for plan in plans:
            self._let_go(plan.slot, plan.column)
        for plan, n in zip(plans, lengths, strict=True):
            if plan.shared:
                copies += self._separate(plan.slot, plan.shared)
            if n:
                self._extend(plan.slot, plan.start, self._pages_for(plan.end))
        starts, after = [plan.start for plan in plans], [plan.end for plan in plans]
        # The first of the new tokens sees more than the last, unless it looks elsewhere.
        first = None
        if self.window is not None:
            first = [
                self._held_from(seen + (n if self.is_large(n) else min(n, 1)))
                for seen, n in zip(before, lengths, strict=True)
            ]
        kept = None
        if starts != list(before):
            rows = zip(starts, before, lengths, strict=True)
            kept = torch.cat([torch.arange(n) >= start - seen for start, seen, n in rows]).nonzero().flatten()
        table = BlockTable(self.pages_of(slots), after, self.page_size, first)
        return PageStep(table, self._places(slots, starts, after), kept, tuple(copies))

    def release(self, slot: int) -> None:
        """Give back all pages of a slot's sequence."""
        self._planned = None
        self._drop(slot, self._first[slot], self._end[slot])
        self._first[slot] = self._end[slot] = self._begin[slot] = 0

    def share(self, source: int, target: int) -> None:
        """Let the sequence of the empty slot `target` have the pages of that of `source` as well."""
        self._planned = None
        for page in self.own(source):
            self._users[page] += 1
            self._shared_users += 1
        self._table[target] = self._table[source]
        for of_slot in (self._first, self._end, self._begin):
            of_slot[target] = of_slot[source]

    def check_shorter(self, slot: int, tokens: int) -> None:
        """Raise PoolError where a sequence cannot go back to its first `tokens` tokens: entries that the next one would
        see have been given back."""
        if tokens and self._begin[slot] > self._held_from(tokens):
            raise PoolError(
                f"the sequence in slot {slot} cannot go back to {tokens} tokens: its window of {self.window} has let "
                f"go of what stood before token {self._begin[slot]}"
            )

    def shorten(self, slot: int, tokens: int) -> None:
        """Give back the pages behind the first `tokens` tokens. Errors as `check_shorter`."""
        self.check_shorter(slot, tokens)
        self._planned = None
        if not tokens:
            return self.release(slot)
        end = max(self._pages_for(tokens), self._first[slot])
        self._drop(slot, end, self._end[slot])
        self._end[slot] = end

    def check_integrity(self) -> None:
        """Raise PoolError unless each page is free once or has as many users as sequences that hold it."""
        users = [0] * self.pages
        for slot in range(self._table.shape[0]):
            for page in self.own(slot):
                if not 0 <= page < self.pages:
                    raise PoolError(f"slot {slot} holds page {page}, which is not there")
                users[page] += 1
        for page, (counted, noted) in enumerate(zip(users, self._users, strict=True)):
            if counted != noted:
                raise PoolError(f"page {page} is held by {counted} sequences and counted for {noted}")
        if self._shared_users != sum(max(counted - 1, 0) for counted in users):
            raise PoolError(
                f"{self._shared_users} users of shared pages are counted; the pages are held {users} times"
            )
        free = sorted(self._free)
        if free != [page for page, counted in enumerate(users) if not counted]:
            raise PoolError("the free pages are not those that no sequence holds")

    def is_large(self, n: int) -> bool:
        """Whether so many tokens have no room beside a window: the last ones are kept, and all look at copies."""
        return self.window is not None and n > self.page_size

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _held_from(self, tokens: int) -> int:
        """The first token of which a sequence of `tokens` keeps entries."""
        return 0 if self.window is None else max(tokens - self.window, 0)

    def _plan(self, slots: Sequence[int], before: Sequence[int], lengths: Sequence[int]) -> list[_Plan]:
        """What each sequence that brings tokens does; PoolError where there are too few pages for it."""
        key = (slots, before, lengths)
        if self._planned is not None and self._planned[0] == key:
            return self._planned[1]
        plans, wanted = [], 0
        for slot, seen, n in zip(slots, before, lengths, strict=True):
            large, end = self.is_large(n), seen + n
            start = max(seen, self._held_from(end)) if large else seen
            # What the last step left may be needed to go back behind it, so one token less is let go.
            column = min(self._held_from(end if large else seen) // self.page_size, self._end[slot])
            column = max(column, self._first[slot]) if n else self._first[slot]
            shared = (
                self._shared(slot, max(column, 0 if self.rewrites else start // self.page_size)) if n else []
            )
            taken = max(self._end[slot], start // self.page_size)
            wanted += max(self._pages_for(end) - taken, 0) * (n > 0) + len(shared)
            if column > self._first[slot]:
                let_go = self._table[slot, self._first[slot] : column].tolist()
                wanted -= sum(self._users[page] == 1 for page in let_go)
            plans.append(_Plan(slot, start, end, column, shared))
        if wanted > self.free_pages:
            raise PoolError(
                f"the pool is full: {len(slots)} sequences need {wanted} more pages of {self.page_size} tokens, and "
                f"{self.free_pages} of {self.pages} are free. Free or evict sequences, or make the pool larger"
            )
        self._planned = key, plans
        return plans

    def _shared(self, slot: int, column: int) -> list[int]:
        """The columns from this one on in which a slot has pages that other sequences have as well."""
        if not self._shared_users:
            return []
        pages = self._table[slot, column : self._end[slot]].tolist()
        return [column + i for i, page in enumerate(pages) if self._users[page] > 1]

    def _separate(self, slot: int, columns: Sequence[int]) -> list[tuple[int, int]]:
        """Take pages of its own in the place of shared ones; which to copy from and to."""
        copies = []
        for column in columns:
            page = int(self._table[slot, column])
            if self._users[page] > 1:
                self._users[page] -= 1
                self._shared_users -= 1
                own = self._take()
                self._table[slot, column] = own
                copies.append((page, own))
        return copies

    def _extend(self, slot: int, start: int, end: int) -> None:
        """Take pages up to column `end` for the entries from `start` on."""
        if end > self._table.shape[1]:
            more = max(end, 2 * self._table.shape[1]) - self._table.shape[1]
            # Made in inference mode, it could not be written outside of it.
            with torch.inference_mode(False):
                self._table = torch.cat(
                    [self._table, self._table.new_full((len(self._table), more), -1)], dim=1
                )
        begin = max(start // self.page_size, self._end[slot])
        if self._first[slot] == self._end[slot]:
            self._first[slot], self._begin[slot] = begin, start
        for column in range(begin, end):
            self._table[slot, column] = self._take()
        self._end[slot] = max(self._end[slot], end)

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _let_go(self, slot: int, column: int) -> None:
        """Give back the pages before a column."""
        if column > self._first[slot]:
            self._drop(slot, self._first[slot], column)
            self._first[slot] = column
            self._begin[slot] = max(self._begin[slot], column * self.page_size)

    def _drop(self, slot: int, begin: int, end: int) -> None:
        for page in self._table[slot, begin:end].tolist():
            self._users[page] -= 1
            if self._users[page]:
                self._shared_users -= 1
            else:
                self._free.append(page)
        self._table[slot, begin:end] = -1

    def _places(self, slots: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> Tensor:
        counts = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
        total = sum(ends) - sum(starts)
        if total == len(starts) and bool((counts == 1).all()):
            entries, rows = torch.tensor(starts), torch.tensor(list(slots))
            return self._table[rows, entries // self.page_size] * self.page_size + entries % self.page_size
        first = torch.repeat_interleave(
            torch.tensor(starts) - torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]]), counts
        )
        entries = torch.arange(total) + first
        rows = torch.repeat_interleave(torch.tensor(list(slots)), counts)
        return self._table[rows, entries // self.page_size] * self.page_size + entries % self.page_size
