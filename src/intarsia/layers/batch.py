"""Some sequences of a pool at one time, and what their next tokens do: worked out once for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.books import Books, HasRows
from intarsia.layers.paging import PageStep, Paging
from intarsia.ops import Slots
from intarsia.ops.keys import BlockTable
from intarsia.ops.sequences import placed

Where = slice | Tensor
"""What selects rows of a tensor: where they follow each other a slice, which copies nothing."""


def batch_of(books: Books, slots: Sequence[int]) -> Batch:
    """The sequences of these slots, in this order; errors as `Pool.view`."""
    tokens = books.tokens(slots)
    if not slots or len(set(slots)) < len(slots):
        raise ConfigError(f"a batch is of different slots, one at least; got {list(slots)}")
    return Batch(books, tuple(slots), tokens)


def arrival(books: Books, slots: Sequence[int] | None, tokens: tuple[int, ...]) -> Step:
    """The step that writes sequences which come from elsewhere and have seen `tokens`. Errors as `Books.bring`."""
    chosen = books.bring(slots, tokens)
    return Batch(books, chosen, (0,) * len(tokens)).step(tokens)


class Batch:
    """The sequences of some slots as they are at one time: what the states of all layers share.

    Attributes:
        slots, tokens: of each sequence; the tokens that it has seen.
        followed: the step that goes on from here, while it goes through the layers.
    """

    def __init__(self, books: Books, slots: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        self.books, self.slots, self.tokens = books, slots, tokens
        self.followed: Step | None = None
        self._changed = books.changed(slots)
        self._rows = books.rows.of(slots)
        self._pages: dict[Paging, Tensor] = {}
        self._tables: dict[Paging, BlockTable] = {}
        self._where: dict[torch.device, Where] = {}
        self._positions: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._others: dict[object, Batch] = {}

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.slots)

    def check_current(self) -> None:
        """Raise ConfigError where a sequence has gone on since."""
        if self.books.changed(self.slots) != self._changed:
            raise ConfigError("the view is of sequences that have gone on since: take a new one of the pool")

    def check_room(self, lengths: Sequence[int]) -> None:
        """Raise PoolError where the next `lengths` tokens find too few pages, and ConfigError as `check_current`."""
        self.check_current()
        for paging in self.books.pagings.values():
            paging.check_room(self.slots, self.tokens, lengths)

    def step(self, lengths: tuple[int, ...]) -> Step:
        """What the next `lengths` tokens of the sequences do. Made once, for all layers.

        Raises:
            PoolError: there are too few pages. None has been taken then.
            ConfigError: the sequences have gone on otherwise, or not in all layers.
        """
        if self.followed is None:
            self.check_room(lengths)
            for paging in self.books.pagings.values():
                self._pages_of(paging)  # as they are now: layers that come later look at them as well
            self.followed = Step(self, lengths)
        elif self.followed.lengths != lengths:
            raise ConfigError("the view is of sequences that have gone on since: take a new one of the pool")
        return self.followed

    def back_to(self, tokens: Sequence[int]) -> Batch:
        """The sequences with their first `tokens` tokens alone. Done once, for all layers."""
        key = ("back", tuple(tokens))
        if key not in self._others:
            self.check_current()
            for paging in self.books.pagings.values():
                for slot, n in zip(self.slots, tokens, strict=True):
                    paging.check_shorter(slot, n)
            for paging in self.books.pagings.values():
                for slot, n in zip(self.slots, tokens, strict=True):
                    paging.shorten(slot, n)
            self.books.note(self.slots, tokens)
            self._others[key] = Batch(self.books, self.slots, tuple(tokens))
        return self._others[key]

    def select(self, indices: Sequence[int]) -> Batch:
        """The sequences with these numbers, which must differ; of one selection one batch, for all layers."""
        key = ("select", tuple(indices))
        if key not in self._others:
            if len(set(indices)) < len(indices):
                raise ConfigError(
                    "two views of one slot would write to the same place: fork the sequence in the pool"
                )
            self.check_current()
            slots, tokens = (tuple(x[i] for i in indices) for x in (self.slots, self.tokens))
            self._others[key] = Batch(self.books, slots, tokens)
        return self._others[key]

    def joined(self, batches: Sequence[Batch]) -> Batch | None:
        """The sequences of all these batches, of which this is the first; None where they do not differ or are not of
        the same books. Of one combination one batch, for all layers."""
        key = ("joined", *batches)
        if key not in self._others:
            slots = tuple(slot for batch in batches for slot in batch.slots)
            if any(batch.books is not self.books for batch in batches) or len(set(slots)) < len(slots):
                return None
            for batch in batches:
                batch.check_current()
            self._others[key] = Batch(self.books, slots, tuple(n for batch in batches for n in batch.tokens))
        return self._others[key]

    def table(self, paging: Paging) -> BlockTable:
        """Where the entries lie that the sequences hold."""
        if paging not in self._tables:
            self._tables[paging] = paging.table(self._pages_of(paging), self.tokens)
        return self._tables[paging]

    def where(self, device: torch.device) -> Where:
        """The sequences' rows."""
        if device not in self._where:
            self._where[device] = where(self._rows, device)
        return self._where[device]

    def positions(self, lengths: tuple[int, ...], packed: bool, device: torch.device) -> Tensor:
        """The positions of the next `lengths` tokens of each: in one row, or `[B, T]` where they are of one length."""
        key = (lengths, device)
        if key not in self._positions:
            self._positions[key] = placed(_positions(self.tokens, lengths), device)
        found = self._positions[key]
        return found if packed else found.view(len(lengths), -1)

    def _pages_of(self, paging: Paging) -> Tensor:
        if paging not in self._pages:
            self._pages[paging] = paging.pages_of(self.slots)
        return self._pages[paging]


class Step:
    """Some sequences while their next tokens are computed, in one layer after the other.

    Attributes:
        before, after: the batch, and what it has become.
        lengths: how many tokens each sequence brings.
        read, write: the row in which each sequence's state is found, and that in which what follows belongs: another
            one where it was shared with another sequence.
        copies: the rows to copy before anything is written: from one, to another.
    """

    def __init__(self, batch: Batch, lengths: tuple[int, ...]) -> None:
        self._books, self.before, self.lengths = batch.books, batch, lengths
        books = batch.books
        books.begin(batch.slots)
        self._pages = {p: p.step(batch.slots, batch.tokens, lengths) for p in books.pagings.values()}
        self.read, self.write, self.copies = books.rows.step(batch.slots, lengths)
        tokens = tuple(seen + n for seen, n in zip(batch.tokens, lengths, strict=True))
        books.note(batch.slots, tokens)
        self.after = Batch(books, batch.slots, tokens)
        self._done: set[object] = set()
        self._slots: dict[tuple[int, ...], Slots] = {}
        self._where: dict[torch.device, tuple[Where, Where]] = {}

    def is_done(self, pool: HasRows) -> bool:
        """Whether this pool has been written."""
        return pool in self._done

    def begin(self, pool: HasRows) -> None:
        """Note that this pool is being written."""
        self._done.add(pool)
        if len(self._done) == self._books.pools:
            self._books.finish(self.before.slots)
            # All layers have gone on, which the books say. Each other's, the two would wait for the garbage collector,
            # and with them page tables, which are large behind long texts.
            self.before.followed = None

    def pages(self, paging: Paging, device: torch.device) -> PageStep:
        """Where the tokens go in pages."""
        found = self._pages[paging]
        if found.places.device != device:
            found = self._pages[paging] = found.to(device)
        return found

    def where(self, device: torch.device) -> tuple[Where, Where]:
        """The rows to read and the rows to write."""
        if device not in self._where:
            read = where(self.read, device)
            self._where[device] = read, read if self.read == self.write else where(self.write, device)
        return self._where[device]

    def slots(self, lengths: tuple[int, ...]) -> Slots:
        """The rows as operators take them, of those sequences that bring tokens: `lengths` of them."""
        if lengths not in self._slots:
            some = [n for n, length in enumerate(lengths) if length]
            self._slots[lengths] = Slots(
                [self.read[n] for n in some], [self.write[n] for n in some], [lengths[n] for n in some]
            )
        return self._slots[lengths]


def where(rows: tuple[int, ...], device: torch.device) -> Where:
    """What selects these rows of a tensor."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return placed(torch.tensor(rows), device)


def _positions(tokens: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
    """`tokens[n]`, `tokens[n] + 1`, … of each sequence, `lengths[n]` of them, one behind the other."""
    seen, counts = torch.tensor(tokens), torch.tensor(lengths)
    begins = counts.cumsum(0) - counts
    total = sum(lengths)
    return torch.arange(total) + torch.repeat_interleave(seen - begins, counts, output_size=total)
