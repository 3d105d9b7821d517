"""The state of a softmax mixer as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.growing.state import GrowingState, Growth
from intarsia.layers.growing.tensor import GrowingTensor
from intarsia.layers.states import State
from intarsia.ops.compiler import all_same
from intarsia.ops.keys import Keys
from intarsia.ops.sequences import Sequences

Rows = tuple[GrowingTensor, ...]
"""The entries of N sequences: of one length in one tensor, or of each sequence in a tensor of its own."""


@dataclass(frozen=True)
class GrowingValue(GrowingState):
    """The state as a value. Sequences of different lengths have tensors of their own, so that selecting, concatenating
    and shortening them copies nothing; their tensors' names end in their number, `keys.0`."""

    form: GrowingForm
    growing: dict[str, Rows]
    of_sequence: dict[str, Tensor]
    """What has a fixed size, `[N, ...]`."""
    tokens: tuple[int, ...]

    @property
    def together(self) -> bool:
        """Whether all sequences stand in one tensor."""
        return all(len(rows) == 1 for rows in self.growing.values())

    def tensors(self) -> dict[str, Tensor]:
        if self.together:
            return {name: rows[0].content for name, rows in self.growing.items()} | self.of_sequence
        growing = {
            f"{name}.{n}": row.content for name, rows in self.growing.items() for n, row in enumerate(rows)
        }
        return growing | self.of_sequence

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> GrowingValue:
        tokens = self.tokens if tokens is None else tokens
        growing = {}
        for name in self.growing:
            of_each = (
                [tensors[name]] if name in tensors else [tensors[f"{name}.{n}"] for n in range(len(tokens))]
            )
            growing[name] = tuple(GrowingTensor(x, self.form.window) for x in of_each)
        fixed = {name: tensors[name] for name in self.of_sequence}
        return GrowingValue(self.form, growing, fixed, tokens)

    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        self.check_input(x)
        return _ValueGrowth(self, x, seqs)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.growing[name][0].content.dtype

    def value(self) -> GrowingValue:
        return self

    def last(self, name: str) -> Tensor:
        def of(row: GrowingTensor) -> Tensor:
            content = row.content
            return content[:, -1] if len(row) else content.new_zeros(content.shape[0], *content.shape[2:])

        return torch.cat([of(row) for row in self.growing[name]])

    def fixed(self, name: str) -> Tensor:
        return self.of_sequence[name]

    def select(self, indices: Sequence[int]) -> GrowingValue:
        self.check_numbers(indices)
        if self.together and (len(indices) > 1 or self.count == 1):
            return self if list(indices) == list(range(self.count)) else super().select(indices)
        growing = {name: tuple(apart(rows)[i] for i in indices) for name, rows in self.growing.items()}
        fixed = {name: x[list(indices)] for name, x in self.of_sequence.items()}
        return GrowingValue(self.form, growing, fixed, tuple(self.tokens[i] for i in indices))

    def joined(self, states: Sequence[State]) -> GrowingValue:
        alike = [state.value() if isinstance(state, GrowingState) else state for state in states]
        values = [state for state in alike if isinstance(state, GrowingValue)]
        forms = [state._form() if isinstance(state, GrowingValue) else type(state) for state in alike]
        strange = next((form for form in forms if form != forms[0]), None)
        if strange is not None:
            raise ShapeError(f"states of different forms cannot be concatenated: {forms[0]} and {strange}")
        tokens = tuple(n for value in values for n in value.tokens)
        fixed = {name: torch.cat([v.of_sequence[name] for v in values]) for name in self.of_sequence}
        growing = {}
        each = {name: [row for value in values for row in value.growing[name]] for name in self.growing}
        together = all(value.together for value in values) and all(
            len({len(row) for row in rows}) == 1 for rows in each.values()
        )
        for name, rows in each.items():
            if together:
                rows = [GrowingTensor(torch.cat([row.content for row in rows]), self.form.window)]
            else:
                rows = [row for value in values for row in apart(value.growing[name])]
            growing[name] = tuple(rows)
        return GrowingValue(self.form, growing, fixed, tokens)

    def check_truncated(self, tokens: Sequence[int]) -> None:
        super().check_truncated(tokens)
        window = self.form.window
        if window is not None and max(self.tokens) > window and tuple(tokens) != self.tokens:
            raise UnsupportedError(
                f"of {max(self.tokens)} tokens this state keeps the last {window}: keep the state of the place to "
                "go back to"
            )

    def truncated(self, tokens: Sequence[int]) -> GrowingValue:
        self.check_truncated(tokens)
        if tuple(tokens) == self.tokens:
            return self
        together = self.together and all_same(tokens)
        strides = {name: entry.stride for name, entry in self.form.growing.items()}
        growing = {
            name: (rows[0].shortened(tokens[0] // strides[name]),)
            if together
            else tuple(row.shortened(n // strides[name]) for row, n in zip(apart(rows), tokens, strict=True))
            for name, rows in self.growing.items()
        }
        return replace(self, growing=growing, tokens=tuple(tokens))

    def _form(self) -> object:
        content = {name: rows[0].content for name, rows in self.growing.items()}
        return (
            self.form.kind,
            self.form.window,
            {name: (x.shape[2:], x.dtype, x.device) for name, x in content.items()},
            {name: (x.shape[1:], x.dtype, x.device) for name, x in self.of_sequence.items()},
        )


class _ValueGrowth(Growth):
    """A value while the next one is made."""

    def __init__(self, state: GrowingValue, x: Tensor, seqs: Sequences | None) -> None:
        self._state, self._seqs = state, seqs
        self._tokens = state.tokens_after(x, seqs)
        self._growing, self._fixed = dict(state.growing), dict(state.of_sequence)
        # A row of one sequence is a batch of one.
        self._whole = state.together and (seqs is None or seqs.count == 1)

    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        return tuple(self._append(name, each) for name, each in entries.items())

    def _append(self, name: str, entries: Tensor) -> Keys:
        if self._whole:
            read, after = self._growing[name][0].extended(entries)
            self._growing[name] = (after,)
            return read
        parts = entries.split(1) if self._seqs is None else entries.split(self._seqs.lengths, dim=1)
        both = [row.extended(part) for row, part in zip(apart(self._growing[name]), parts, strict=True)]
        self._growing[name] = tuple(after for _, after in both)
        return tuple(read for read, _ in both)

    def add(self, name: str, rows: Tensor | Sequence[Tensor]) -> Keys:
        if self._whole:
            (of_all,) = [rows] if isinstance(rows, Tensor) else rows
            read, after = self._growing[name][0].extended(of_all)
            self._growing[name] = (after,)
            return read
        parts = rows.split(1) if isinstance(rows, Tensor) else rows
        both = [row.extended(part) for row, part in zip(apart(self._growing[name]), parts, strict=True)]
        self._growing[name] = tuple(after for _, after in both)
        return tuple(read for read, _ in both)

    def before(self, name: str) -> Keys:
        rows = self._growing[name]
        return rows[0].content if self._whole else tuple(row.content for row in apart(rows))

    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> None:
        old = self._growing[name] if self._whole else apart(self._growing[name])
        self._growing[name] = tuple(
            kept if row is None else GrowingTensor(row) for kept, row in zip(old, rows, strict=True)
        )

    def fix(self, name: str, content: Tensor) -> None:
        self._fixed[name] = content

    def end(self) -> GrowingState:
        return GrowingValue(self._state.form, self._growing, self._fixed, self._tokens)


def apart(rows: Rows) -> Rows:
    """The entries of each sequence in a tensor of its own."""
    if len(rows) > 1:
        return rows
    return tuple(rows[0].row(n) for n in range(rows[0].content.shape[0]))
