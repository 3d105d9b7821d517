"""Which row of the pools' tensors belongs to which sequence: numbers alone, no content."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.errors import PoolError

Copies = tuple[tuple[int, int], ...]


class Rows:
    """A row for the sequence of each slot, which forks share until they go on.

    Who goes on from a row that it shares reads that one and writes one of its own: nothing is copied. There are as many
    rows as slots, which is always enough.
    """

    def __init__(self, slots: int) -> None:
        self._row = [-1] * slots
        self._users = [0] * slots
        self._free = set(range(slots))
        self._shared = 0  # how many more sequences than rows there are

    def of(self, slots: Sequence[int]) -> tuple[int, ...]:
        """The rows of the sequences in these slots."""
        return tuple(map(self._row.__getitem__, slots))

    def take(self, slot: int) -> int:
        """A row for a slot that has none."""
        # The one of its own number where it is free: rows of slots that follow each other then do so as well.
        row = slot if slot in self._free else next(iter(self._free))
        self._free.remove(row)
        self._row[slot], self._users[row] = row, 1
        return row

    def release(self, slot: int) -> None:
        """Give the slot's row back."""
        self._leave(self._row[slot])
        self._row[slot] = -1

    def share(self, source: int, target: int) -> None:
        """Let the slot `target`, which has none, have the row of `source` as well."""
        row = self._row[target] = self._row[source]
        self._users[row] += 1
        self._shared += 1

    def step(
        self, slots: Sequence[int], lengths: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], Copies]:
        """The rows that sequences which bring so many tokens read and write, and what is to be copied before: where one
        that leaves a shared row and the one that stays in it go on together."""
        if not self._shared:
            rows = self.of(slots)
            return rows, rows, ()
        read, write, copies = list(self.of(slots)), list(self.of(slots)), []
        left: dict[int, list[int]] = {}
        for n, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            row = self._row[slot]
            if length and self._users[row] > 1:
                self._leave(row)
                write[n] = self.take(slot)
                left.setdefault(row, []).append(n)
            elif length and row in left:
                for other in left.pop(row):
                    copies.append((row, write[other]))
                    read[other] = write[other]
        return tuple(read), tuple(write), tuple(copies)

    def check_integrity(self) -> None:
        """Raise PoolError unless each row is free or has as many users as slots that have it."""
        users = [self._row.count(row) for row in range(len(self._row))]
        if users != self._users or self._free != {row for row, count in enumerate(users) if not count}:
            raise PoolError(
                f"rows are counted for {self._users} slots and held by {users}; free: {self._free}"
            )
        if self._shared != sum(max(count - 1, 0) for count in users):
            raise PoolError(f"{self._shared} shared rows are counted; the rows are held by {users}")

    def _leave(self, row: int) -> None:
        self._users[row] -= 1
        if self._users[row]:
            self._shared -= 1
        else:
            self._free.add(row)
