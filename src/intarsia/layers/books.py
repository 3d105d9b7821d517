"""What the pools of all layers have in common, said and worked out once for all of them.

Which slots are taken, how many tokens their sequences have seen and where these lie is the same in every layer. So the
pools of a model share `Books`; the states of some slots share a `Batch`, and what the next tokens do to it is a `Step`,
which the first layer makes and the others find (`intarsia.layers.batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from intarsia.errors import ConfigError, ShapeError
from intarsia.layers.paging import Paging
from intarsia.layers.rows import Rows

PAGE_SIZE = 16
"""The tokens of a page, where nobody says otherwise."""


class HasRows(Protocol):
    """A pool, as the books see it."""

    def clear_row(self, row: int) -> None:
        """Make the row that of a sequence that has seen nothing."""
        ...


class Books:
    """The slots of a model's pools. Not for several threads at once.

    Attributes:
        page_size: the tokens of a page, in layers whose states grow.
        rows: which row of the pools' tensors each sequence has.
        pagings: which pages each sequence has, in each kind of layers that needs the same.
    """

    def __init__(self, slots: int, page_size: int = PAGE_SIZE) -> None:
        if slots < 1 or page_size < 1:
            raise ConfigError(
                f"a pool needs a slot at least, and a page room for a token; got {slots} slots and pages of {page_size}"
            )
        self.page_size, self.rows = page_size, Rows(slots)
        self.pagings: dict[tuple[int, int | None, bool], Paging] = {}
        self._pools: list[HasRows] = []
        self._tokens: list[int | None] = [None] * slots
        # When a slot's sequence became what it is, in a count of changes.
        self._changed, self._now = [0] * slots, 0
        # The slots whose last step has not come through all layers.
        self._unfinished: set[int] = set()

    @property
    def slots(self) -> int:
        """How many there are, taken or free."""
        return len(self._tokens)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """The numbers of those that hold no sequence."""
        return tuple(slot for slot, seen in enumerate(self._tokens) if seen is None)

    @property
    def pools(self) -> int:
        """How many pools share these books."""
        return len(self._pools)

    def join(self, pool: HasRows) -> None:
        """Keep the books of this pool as well. No slot may be taken yet."""
        self._pools.append(pool)

    def paging(self, pages: int, window: int | None, rewrites: bool) -> Paging:
        """The page table for layers with so many pages, which keep entries of a `window` of tokens; shared by all that
        ask for the same."""
        key = (pages, window, rewrites)
        if key not in self.pagings:
            self.pagings[key] = Paging(pages, self.page_size, self.slots, window, rewrites)
        return self.pagings[key]

    def tokens(self, slots: Sequence[int]) -> tuple[int, ...]:
        """How many tokens the sequences in these slots have seen; errors as `Pool.tokens`."""
        return tuple(self.taken(slot) for slot in slots)

    def take(self, slot: int | None = None) -> int:
        """Let a sequence begin; see `Pool.take`."""
        slot = self._free(slot)
        row = self.rows.take(slot)
        for pool in self._pools:
            pool.clear_row(row)
        self._set(slot, 0)
        return slot

    def free(self, slot: int) -> None:
        """Let the sequence of a slot go."""
        self.taken(slot)
        self.rows.release(slot)
        for paging in self.pagings.values():
            paging.release(slot)
        self._set(slot, None)

    def fork(self, source: int, target: int | None = None) -> int:
        """Let a second sequence share all that `source` has, until one of them goes on; see `Pool.fork`."""
        seen, target = self.taken(source), self._free(target)
        self.rows.share(source, target)
        for paging in self.pagings.values():
            paging.share(source, target)
        self._set(target, seen)
        if source in self._unfinished:
            self._unfinished.add(target)
        return target

    def roll_back(self, slot: int, snapshot: int) -> None:
        """Put the sequence of the slot `snapshot` in the place of that of `slot`; see `Pool.roll_back`."""
        self.taken(slot)
        self.taken(snapshot)
        if slot == snapshot:
            raise ConfigError(f"slot {slot} cannot go back to itself: its snapshot has a slot of its own")
        self.free(slot)
        self.fork(snapshot, slot)
        self.free(snapshot)

    def bring(self, slots: Sequence[int] | None, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Take slots (None: any) for sequences that come from elsewhere and have seen `tokens`, and which will be
        written as if these were their next ones. Errors as `Pool.restore`; nothing is taken then."""
        chosen = self.free_slots[: len(tokens)] if slots is None else tuple(slots)
        if len(chosen) != len(tokens):
            raise ShapeError(
                f"the state is of {len(tokens)} sequences; {len(chosen)} slots are there for them"
            )
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"each sequence has a slot of its own; got {list(chosen)}")
        for slot in chosen:
            self._free(slot)
        for paging in self.pagings.values():
            paging.check_room(chosen, (0,) * len(tokens), tokens)
        for slot in chosen:
            self.rows.take(slot)
            self._set(slot, 0)
        return chosen

    def taken(self, slot: int) -> int:
        """The tokens that the sequence of a slot has seen, which must be there."""
        self._check(slot)
        seen = self._tokens[slot]
        if seen is None:
            raise ConfigError(f"slot {slot} holds no sequence")
        return seen

    def changed(self, slots: Sequence[int]) -> tuple[int, ...]:
        """When each of these slots became what it is."""
        return tuple(map(self._changed.__getitem__, slots))

    def begin(self, slots: Sequence[int]) -> None:
        """Note that these go on, one layer after the other.

        Raises:
            ConfigError: the last step of one has not come through all layers.
        """
        if not self._unfinished.isdisjoint(slots):
            raise ConfigError(
                "the last step of these sequences ended before it had gone through all layers: roll them back to a "
                "fork or free them"
            )
        self._unfinished.update(slots)

    def finish(self, slots: Sequence[int]) -> None:
        """Note that these have gone on in all layers."""
        self._unfinished.difference_update(slots)

    def note(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Write down what sequences have seen now."""
        self._now += 1
        for slot, seen in zip(slots, tokens, strict=True):
            self._tokens[slot], self._changed[slot] = seen, self._now

    def _set(self, slot: int, seen: int | None) -> None:
        self._now += 1
        self._tokens[slot], self._changed[slot] = seen, self._now
        self._unfinished.discard(slot)

    def _free(self, slot: int | None) -> int:
        if slot is None:
            if not self.free_slots:
                raise ConfigError(f"all {self.slots} slots are taken")
            return self.free_slots[0]
        self._check(slot)
        if self._tokens[slot] is not None:
            raise ConfigError(f"slot {slot} is taken")
        return slot

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ConfigError(f"there is no slot {slot}: the pool has {self.slots}, counted from 0")
