"""States of many sequences in one place, and which of them the sequences of a batch read and write."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError

NEW = -1
"""The slot to read of a sequence that begins: its state is zero."""


class StatePool:
    """Room for the states of many sequences, one slot each; contiguous, of one dtype and on one device.

    Attributes:
        board: `[slots, HV, K, V]`, float32 (float64 for float64 inputs).
        conv: the last `W - 1` inputs of the short convolution, the oldest first, `[slots, W - 1, channels]`, or
            None for a layer without convolution. A slot is both: what belongs together is kept together.
    """

    def __init__(self, board: Tensor, conv: Tensor | None = None) -> None:
        self.board, self.conv = board, conv
        self._check()
        self.slots = board.shape[0]
        self.form = (board.dtype, tuple(board.shape[1:]), None if conv is None else tuple(conv.shape[1:]))
        """What all slots have in common: dtype, `(HV, K, V)`, `(W - 1, channels)`."""

    @property
    def nbytes(self) -> int:
        """The size of all slots."""
        return self.board.nbytes + (0 if self.conv is None else self.conv.nbytes)

    def new_like(self) -> StatePool:
        """A pool of the same form whose content is whatever stood in memory."""
        return StatePool(
            torch.empty_like(self.board), None if self.conv is None else torch.empty_like(self.conv)
        )

    def _check(self) -> None:
        board, conv = self.board, self.conv
        if board.dim() != 4 or board.shape[0] == 0:
            raise ShapeError(f"board must be [slots, HV, K, V] with a slot at least; got {list(board.shape)}")
        if board.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"states are float32 (or float64); board is {board.dtype}")
        if conv is not None and (conv.dim() != 3 or conv.shape[0] != board.shape[0]):
            raise ShapeError(
                f"conv must be [slots, W - 1, channels] with {board.shape[0]} slots, as board has; "
                f"got {list(conv.shape)}"
            )
        if conv is not None and (conv.dtype, conv.device) != (board.dtype, board.device):
            raise ShapeError(
                f"conv must be {board.dtype} on {board.device}, as board is; got {conv.dtype} on {conv.device}"
            )
        for name, tensor in (("board", board), ("conv", conv)):
            if tensor is not None and not tensor.is_contiguous():
                raise ShapeError(f"{name} must be contiguous: slots lie behind each other")


class Places(Protocol):
    """Where the states of a batch stand in a room, and where what follows them belongs."""

    def where(self, device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
        """What selects the slots to read and the slots to write."""
        ...

    def slots(self, lengths: tuple[int, ...]) -> Slots:
        """The same for the sequences that bring tokens, `lengths` of them."""
        ...


class InSlots:
    """The states of N sequences in the slots of a room. An operator that is given this as `initial_state` reads them
    there, writes the states that follow to the slots where they belong, and returns it as the final state.

    Attributes:
        room: `[slots, ...]`, of which a slot is what one sequence has in an `initial_state`.
        places: which slots, of each sequence.
        shape: of all N together.
        pool: the room as the decode step takes it, where it is one of boards.
    """

    def __init__(self, room: Tensor, places: Places, count: int, pool: StatePool | None = None) -> None:
        self.room, self.places, self.pool = room, places, pool
        self.shape = (count, *room.shape[1:])

    def gathered(self) -> Tensor:
        """The states in a tensor: a copy, or a view that must not outlive what is written."""
        read = self.room[self.places.where(self.room.device)[0]]
        return read.clone() if torch.is_grad_enabled() else read

    @torch.no_grad()
    def write(self, states: Tensor) -> None:
        """Put the states of all sequences where they belong."""
        self.room[self.places.where(self.room.device)[1]] = states.detach().to(self.room.dtype)


def apart(state: Tensor | InSlots | None) -> tuple[Tensor | None, InSlots | None]:
    """A state that is a tensor, and one that is held in slots."""
    return (None, state) if isinstance(state, InSlots) else (state, None)


def gathered(state: Tensor | InSlots | None) -> Tensor | None:
    """A state as a tensor, wherever it is."""
    return state.gathered() if isinstance(state, InSlots) else state


class Slots:
    """The sequences of a batch: the slot that each one's state is read from, the slot that it is written to, and
    how many tokens each brings. Made once for a batch, it serves every layer and every step; it never changes.

    Attributes:
        read, write, lengths: of each sequence.
        tokens: of all sequences together.
        numbers: as the kernels take all this: how many sequences and tokens, the addresses of the cumulative lengths
            and of the slots to read and to write, the highest of each, and whether one that is written is read by
            another sequence.
    """

    def __init__(
        self, read: Sequence[int], write: Sequence[int] | None = None, lengths: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            read: a slot of each sequence, or `NEW` for a sequence that begins. Several sequences may read one
                slot: a shared prefix.
            write: the same slots by default. Where it differs, what was read stays as it was: a snapshot.
            lengths: one token of each sequence by default.

        Raises:
            ConfigError: a slot that cannot be, or that two sequences write; a length below one; no sequence.
        """
        self.read = tuple(int(slot) for slot in read)
        self.write = self.read if write is None else tuple(int(slot) for slot in write)
        self.lengths = (1,) * len(self.read) if lengths is None else tuple(int(n) for n in lengths)
        self._check()
        self.tokens = sum(self.lengths)
        edges = accumulate(self.lengths, initial=0)
        self._kept_alive = [torch.tensor(list(x)) for x in (edges, self.read, self.write)]
        writer = {slot: n for n, slot in enumerate(self.write)}
        # A slot that one sequence writes and another reads: an error where they are slots of the same pool.
        self._contested = next((slot for n, slot in enumerate(self.read) if writer.get(slot, n) != n), None)
        self.numbers = (
            len(self.read), self.tokens, *(x.data_ptr() for x in self._kept_alive),
            max(self.read), max(self.write), self._contested is not None,
        )  # fmt: skip

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of_rows(batch: int, length: int = 1) -> Slots:
        """The rows of a batch `[batch, length]`, each in the slot of its own number."""
        return Slots(range(batch), lengths=[length] * batch)

    def check_pools(self, slots: int, slots_into: int, same: bool) -> None:
        """Raise ConfigError unless these are slots of a pool that is read and of one that is written, or of one
        pool that is the `same`."""
        if max(self.read) >= slots:
            raise ConfigError(f"there is no slot {max(self.read)} to read: the pool has {slots}")
        if max(self.write) >= slots_into:
            raise ConfigError(f"there is no slot {max(self.write)} to write: the pool has {slots_into}")
        if same and self._contested is not None:
            raise ConfigError(
                f"slot {self._contested} is read by one sequence and written by another: which is first?"
            )

    def _check(self) -> None:
        if not self.read:
            raise ConfigError("a batch needs at least one sequence; got no slots")
        if not len(self.read) == len(self.write) == len(self.lengths):
            raise ConfigError(
                "each sequence has one slot to read, one to write and one length; got "
                f"{len(self.read)}, {len(self.write)} and {len(self.lengths)}"
            )
        if min(self.read) < NEW:
            raise ConfigError(
                f"there is no slot {min(self.read)} to read: slots begin at 0, {NEW} means none"
            )
        if min(self.write) < 0:
            raise ConfigError(
                f"there is no slot {min(self.write)} to write; for sequences that begin, say where to write"
            )
        if min(self.lengths) < 1:
            raise ConfigError(f"every sequence brings at least one token; got {min(self.lengths)}")
        if len(set(self.write)) < len(self.write):
            twice = next(slot for n, slot in enumerate(self.write) if slot in self.write[:n])
            raise ConfigError(f"slot {twice} is written by two sequences")
