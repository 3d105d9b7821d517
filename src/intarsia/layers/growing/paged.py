"""The states of a softmax mixer in a pool: pages for what grows, slots for what has a fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.growing.paging import Paging
from intarsia.layers.growing.state import GrowingState, Growth
from intarsia.layers.growing.tensor import GrowingTensor
from intarsia.layers.growing.value import GrowingValue, Rows
from intarsia.layers.pools import Pool
from intarsia.layers.states import State
from intarsia.ops.keys import Keys, Paged, row_of
from intarsia.ops.sequences import Sequences


class PagedPool(Pool[GrowingState]):
    """The states of many sequences of a softmax mixer, which share pages as long as they are forks.

    Attributes:
        form: what is kept.
        pages: of each name that grows, `[pages, page_size, ...]`.
        fixed: of each other name, `[slots, ...]`.
        paging: which pages belong to which sequence.
    """

    def __init__(self, form: GrowingForm, slots: int, pages: int, page_size: int, like: Tensor) -> None:
        super().__init__(slots)
        self.form = form
        self.paging = Paging(pages, page_size, slots, form.window)
        self.pages = {name: entry.new_zeros(like, pages, page_size) for name, entry in form.growing.items()}
        self.fixed = {name: entry.new_zeros(like, slots) for name, entry in form.fixed.items()}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.pages.values(), *self.fixed.values()))

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return self.paging.free_pages

    def check_integrity(self) -> None:
        """Raise PoolError unless each page is free once, or has as many users as sequences in taken slots hold it."""
        for slot in self.free_slots:
            if self.paging.own(slot):
                raise ConfigError(f"slot {slot} is free and holds pages {self.paging.own(slot)}")
        self.paging.check_integrity()

    def _begin(self, slot: int) -> None:
        with torch.no_grad():
            for x in self.fixed.values():
                x[slot] = 0

    def _release(self, slot: int) -> None:
        self.paging.release(slot)

    def _copy(self, source: int, target: int) -> None:
        self.paging.share(source, target)
        with torch.no_grad():
            for x in self.fixed.values():
                x[target] = x[source]

    def _view(self, slots: tuple[int, ...]) -> GrowingState:
        return PagedState(self, slots, self.tokens(slots))

    def _write(self, slots: tuple[int, ...], state: GrowingState) -> None:
        value = state.value() if isinstance(state, GrowingState) else state
        if not isinstance(value, GrowingValue):
            raise ShapeError(f"the pool is of a softmax mixer; got a state of kind {state.kind!r}")
        self._check_form(value)
        none = (0,) * len(slots)
        step = self.paging.step(slots, none, state.tokens)
        with torch.no_grad():
            for n, (slot, tokens) in enumerate(zip(slots, state.tokens, strict=True)):
                of_sequence = value.select([n]).tensors()
                begin = 0 if self.form.window is None else max(tokens - self.form.window, 0)
                for name, pages in self.pages.items():
                    places = step.table.places([n], [begin], tokens - begin)[0]
                    pages.flatten(0, 1)[places.to(pages.device)] = of_sequence[name][0]
                for name, fixed in self.fixed.items():
                    fixed[slot] = of_sequence[name][0]

    def _check_form(self, value: GrowingValue) -> None:
        content = value.select([0]).tensors()
        for name, held in (*self.pages.items(), *self.fixed.items()):
            behind = 2 if name in self.pages else 1
            x = content.get(name)
            if x is None or (x.shape[behind:], x.dtype) != (held.shape[behind:], held.dtype):
                got = "nothing" if x is None else f"{list(x.shape[behind:])} {x.dtype}"
                raise ShapeError(
                    f"the pool holds {name} of {list(held.shape[behind:])} {held.dtype} for each "
                    f"{'token' if behind == 2 else 'sequence'}; the state has {got}"
                )
        if value.form.window != self.form.window:
            raise ShapeError(
                f"the pool is of a window of {self.form.window}, the state of one of {value.form.window}"
            )


class PagedState(GrowingState):
    """The sequences of some slots of a pool as a state. What follows it is written to the pool; it is of the past then,
    and says so."""

    def __init__(self, pool: PagedPool, slots: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        self.pool, self.slots, self.tokens = pool, slots, tokens

    @property
    def form(self) -> GrowingForm:  # type: ignore[override]
        return self.pool.form

    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        return _PagedGrowth(self, x, seqs)

    def check_room(self, lengths: Sequence[int]) -> None:
        self.check_current()
        self.pool.paging.check_room(self.slots, self.tokens, lengths, bool(self.form.rewritten))

    def check_current(self) -> None:
        """Raise ConfigError where the sequences have gone on since."""
        self.pool.went_on(self.slots, self.tokens, self.tokens)

    def held(self, name: str) -> Paged:
        """The entries of that name."""
        self.check_current()
        return Paged(self.pool.pages[name], self.pool.paging.table(self.slots, self.tokens))

    def last(self, name: str) -> Tensor:
        held = self.held(name)
        begun = [n for n, seen in enumerate(self.tokens) if seen]
        found = held.pages.new_zeros(self.count, *held.pages.shape[2:])
        if begun:
            places = held.table.places(begun, [self.tokens[n] - 1 for n in begun], 1)[:, 0]
            found[begun] = held.pages.flatten(0, 1)[places]
        return found

    def fixed(self, name: str) -> Tensor:
        self.check_current()
        return self.pool.fixed[name][list(self.slots)]

    def value(self) -> GrowingValue:
        window = self.form.window
        alike = len(set(self.tokens)) == 1

        def rows(name: str) -> Rows:
            held = self.held(name)
            found = [row_of(held, n, window) for n in range(self.count)]
            return tuple(GrowingTensor(x, window) for x in ([torch.cat(found)] if alike else found))

        growing = {name: rows(name) for name in self.pool.pages}
        return GrowingValue(
            self.form, growing, {name: self.fixed(name) for name in self.pool.fixed}, self.tokens
        )

    def snapshot(self) -> GrowingState:  # type: ignore[override]
        return self.value()

    def tensors(self) -> dict[str, Tensor]:
        return self.value().tensors()

    def with_tensors(  # type: ignore[override]
        self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None
    ) -> GrowingState:
        return self.value().with_tensors(tensors, tokens)

    def nbytes(self) -> int:
        of_token = sum(x[0, 0].nbytes for x in self.pool.pages.values())
        of_sequence = sum(x[0].nbytes for x in self.pool.fixed.values())
        window = self.form.window
        kept = sum(seen if window is None else min(seen, window) for seen in self.tokens)
        return kept * of_token + self.count * of_sequence

    def recordable(self) -> PagedState:
        return self

    def detach(self) -> PagedState:
        return self

    def select(self, indices: Sequence[int]) -> PagedState:
        self.check_numbers(indices)
        if len(set(indices)) < len(indices):
            raise ConfigError(
                "two views of one slot would write to the same pages: fork the sequence in the pool"
            )
        return PagedState(
            self.pool, tuple(self.slots[i] for i in indices), tuple(self.tokens[i] for i in indices)
        )

    def joined(self, states: Sequence[State]) -> GrowingState:  # type: ignore[override]
        there = [state for state in states if isinstance(state, PagedState) and state.pool is self.pool]
        slots = tuple(slot for state in there for slot in state.slots)
        if len(there) < len(states) or len(set(slots)) < len(slots):
            return self.value().joined(states)
        return PagedState(self.pool, slots, tuple(seen for state in there for seen in state.tokens))

    def check_truncated(self, tokens: Sequence[int]) -> None:
        super().check_truncated(tokens)
        self.check_current()
        for slot, n in zip(self.slots, tokens, strict=True):
            self.pool.paging.check_shorter(slot, n)

    def truncated(self, tokens: Sequence[int]) -> PagedState:
        """The view after the sequences went back, in the pool."""
        self.check_truncated(tokens)
        for slot, n in zip(self.slots, tokens, strict=True):
            self.pool.paging.shorten(slot, n)
        self.pool.went_on(self.slots, self.tokens, tuple(tokens))
        return PagedState(self.pool, self.slots, tuple(tokens))


class _PagedGrowth(Growth):
    """Some sequences of a pool while tokens are written to it."""

    def __init__(self, state: PagedState, x: Tensor, seqs: Sequences | None) -> None:
        self._state, self._pool = state, state.pool
        self._lengths = (x.shape[1],) * state.count if seqs is None else seqs.lengths
        self._seqs, self._tokens = seqs, state.tokens_after(x, seqs)
        state.check_current()
        paging = self._pool.paging
        # More tokens than fit beside a window look at copies of what was there, and at each other where they are.
        self._beside: dict[str, list[Tensor]] | None = None
        if any(map(paging.is_large, self._lengths)):
            self._beside = {
                name: [row_of(state.held(name), n, paging.window) for n in range(state.count)]
                for name in self._pool.pages
            }
        self._step = paging.step(
            state.slots, state.tokens, self._lengths, rewrites=bool(state.form.rewritten)
        )
        self._pool.went_on(state.slots, state.tokens, self._tokens)
        with torch.no_grad():
            for pages in self._pool.pages.values():
                for source, target in self._step.copies:
                    pages[target] = pages[source]

    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        return tuple(self._append(name, each) for name, each in entries.items())

    def _append(self, name: str, entries: Tensor) -> Keys:
        pages, step = self._pool.pages[name], self._step
        flat = entries.detach().flatten(0, 1)
        if step.kept is not None:
            flat = flat[step.kept.to(flat.device)]
        with torch.no_grad():
            pages.flatten(0, 1).index_copy_(0, step.places.to(pages.device), flat.to(pages.dtype))
        if self._beside is None:
            return Paged(pages, step.table)
        parts = entries.split(1) if self._seqs is None else entries.split(self._lengths, dim=1)
        both = zip(self._beside[name], parts, strict=True)
        return tuple(torch.cat([old, part.to(old.dtype)], dim=1) for old, part in both)

    def before(self, name: str) -> Keys:
        return Paged(self._pool.pages[name], self._pool.paging.table(self._state.slots, self._state.tokens))

    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> None:
        pages = self._pool.pages[name]
        with torch.no_grad():
            for n, row in enumerate(rows):
                if row is not None:
                    places = self._step.table.places([n], [0], row.shape[1])[0].to(pages.device)
                    pages.flatten(0, 1).index_copy_(0, places, row[0].detach().to(pages.dtype))

    def fix(self, name: str, content: Tensor) -> None:
        fixed = self._pool.fixed[name]
        with torch.no_grad():
            fixed[list(self._state.slots)] = content.detach().to(fixed.dtype)

    def end(self) -> GrowingState:
        return PagedState(self._pool, self._state.slots, self._tokens)
