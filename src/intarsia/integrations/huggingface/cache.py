"""What `generate` carries from step to step: the states of a batch, as a cache of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.model import ModelStates


@dataclass(frozen=True)
class Past:
    """What a model has read of the rows of a batch."""

    states: ModelStates
    held: Tensor
    """`[B, columns]` bool: at which places there were tokens."""
    last: Tensor | None
    """`[B, D]`, what the head was given for the last token of each row; None where that is not known any more."""

    def select(self, rows: Sequence[int]) -> Past:
        """Of these rows, in this order."""
        where = torch.tensor(list(rows), device=self.held.device)
        last = None if self.last is None else self.last[where]
        return Past(self.states.select(rows), self.held[where], last)


@dataclass(frozen=True)
class Piece:
    """Columns of a batch that go into a model together."""

    tokens: Tensor
    """`[B, T]` int64."""
    held: Tensor
    """`[B, T]` bool."""

    def select(self, rows: Sequence[int]) -> Piece:
        """Of these rows, in this order."""
        where = torch.tensor(list(rows), device=self.held.device)
        return Piece(self.tokens[where], self.held[where])

    def first(self, columns: int) -> Piece:
        """The first columns alone."""
        return Piece(self.tokens[:, :columns], self.held[:, :columns])


@dataclass(frozen=True)
class Step:
    """A piece that was read, and what had been read before it."""

    before: Past | None
    piece: Piece

    def select(self, rows: Sequence[int]) -> Step:
        """Of these rows, in this order."""
        return Step(None if self.before is None else self.before.select(rows), self.piece.select(rows))


class IntarsiaCache(Cache):
    """The states of a batch: values, so that copying the cache copies nothing, and a copy can go on by itself.

    Rows may have seen different numbers of tokens; padding is in no state. Beam search reorders the rows. To drop
    tokens again (`crop`), as drafts want it, the cache goes back to the state before the last piece, if it has been
    told to keep it (`activate_past_recording`); what is kept of that piece is read once more in front of the next one.
    Where all layers keep what they saw, as softmax attention does, it needs no telling.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._past: Past | None = None
        self._again: Piece | None = None
        self._records = False
        self._steps: tuple[Step, ...] = ()

    @property
    def past(self) -> Past | None:
        """What has been read and stays, without what is to be read again."""
        return self._past

    @property
    def again(self) -> Piece | None:
        """What is to be read again in front of the next tokens, since tokens behind it were dropped."""
        return self._again

    @property
    def records(self) -> bool:
        """Whether it keeps what it needs to drop tokens."""
        return self._records

    @property
    def held(self) -> Tensor | None:
        """`[B, columns]` bool: at which of the places before the next there are tokens; None at the beginning."""
        parts = [part.held for part in (self._past, self._again) if part is not None]
        return torch.cat(parts, dim=1) if parts else None

    def went_on(self, piece: Piece, past: Past) -> None:
        """Note that a model has read `piece`, what was to be read again included, and what it has read by then."""
        if self._records:
            self._steps = (*self._steps, Step(self._past, piece))
        self._past, self._again = past, None

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many places a row has, padding included."""
        held = self.held
        return 0 if held is None else held.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._past is not None

    @property
    def batch_size(self) -> int:
        held = self.held
        return -1 if held is None else held.shape[0]

    @property
    def is_initialized(self) -> bool:
        return self._past is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def __len__(self) -> int:
        return 0 if self._past is None else len(self._past.states.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> IntarsiaCache:
        made = IntarsiaCache()
        made._past, made._again = self._past, self._again
        made._records, made._steps = self._records, self._steps
        return made

    def reset(self) -> None:
        self._past, self._again, self._steps = None, None, ()

    def activate_past_recording(self) -> None:
        self._records = True

    def is_recording_past(self, layer_idx: int) -> bool:
        return self._records

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(max(self.batch_size, 0)) for _ in range(repeats)])

    def _select(self, rows: Sequence[int]) -> None:
        if self.held is None:
            return
        self._past = None if self._past is None else self._past.select(rows)
        self._again = None if self._again is None else self._again.select(rows)
        self._steps = tuple(step.select(rows) for step in self._steps)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` places of all rows; 0 lets go of what was kept to do so.

        Raises:
            ShapeError: a positive number, or more than there are.
            UnsupportedError: a layer's state keeps no tokens, and the cache was not told to record.
        """
        drop, there = -tokens_to_remove, self.get_seq_length()
        if not 0 <= drop <= there:
            raise ShapeError(
                f"crop takes minus the number of places to drop, of {there}; got {tokens_to_remove}"
            )
        steps, past, again = list(self._steps), self._past, self._again
        while drop and (again is not None or steps):
            if again is None:
                step = steps.pop()
                past, again = step.before, step.piece
            kept = max(again.tokens.shape[1] - drop, 0)
            drop -= again.tokens.shape[1] - kept
            again = again.first(kept) if kept else None
        if drop:
            assert past is not None
            past = _shortened(past, drop)
        self._past, self._again, self._steps = past, again, ()


def _shortened(past: Past, columns: int) -> Past:
    """The past without its last columns."""
    dropped = past.held[:, -columns:].sum(1).tolist()
    tokens = [n - d for n, d in zip(past.states.tokens, dropped, strict=True)]
    try:
        states = past.states.truncated(tokens)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error}. `cache.activate_past_recording()` before the tokens are read lets `crop` drop them"
        ) from error
    return replace(past, states=states, held=past.held[:, :-columns], last=None)
