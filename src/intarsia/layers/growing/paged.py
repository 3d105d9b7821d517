"""The states of a softmax mixer in a pool: pages for what grows, slots for what has a fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.layers.batch import Batch, Step
from intarsia.layers.books import Books
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.growing.state import GrowingState, Growth
from intarsia.layers.growing.tensor import GrowingTensor
from intarsia.layers.growing.value import GrowingValue, Rows
from intarsia.layers.pools import Pool, PooledState
from intarsia.layers.states import State
from intarsia.ops.keys import Keys, Paged, row_of
from intarsia.ops.sequences import Sequences


class PagedPool(Pool[GrowingState]):
    """The states of many sequences of a softmax mixer, which share pages as long as they are forks.

    Attributes:
        form: what is kept.
        pages: of each name that grows, `[pages, page_size, ...]`.
        fixed: of each other name, `[slots, ...]`, in the rows of the books.
        paging: which pages belong to which sequence; layers that keep the same tokens share it.
    """

    def __init__(self, form: GrowingForm, books: Books, pages: int, like: Tensor) -> None:
        super().__init__(books)
        self.form = form
        self.paging = books.paging(pages, form.window, bool(form.rewritten))
        size = books.page_size
        odd = next((e.stride for e in form.growing.values() if e.stride % size and size % e.stride), None)
        if odd is not None:
            raise ConfigError(
                f"a page of {size} tokens must hold whole strides of {odd} tokens, or these whole pages: choose "
                "another page_size"
            )
        self.pages = {
            name: entry.new_empty(like, pages, max(size // entry.stride, 1))
            for name, entry in form.growing.items()
        }
        self.fixed = {name: entry.new_zeros(like, books.slots) for name, entry in form.fixed.items()}
        self.device = like.device

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
        self.books.rows.check_integrity()

    @torch.no_grad()
    def clear_row(self, row: int) -> None:
        for x in self.fixed.values():
            x[row] = 0

    def view_of(self, batch: Batch) -> GrowingState:
        return PagedState(self, batch)

    def begin(self, batch: Batch, lengths: tuple[int, ...]) -> Step:
        step = super().begin(batch, lengths)
        with torch.no_grad():
            for tensors, copies in (
                (self.pages, step.pages(self.paging, self.device).copies), (self.fixed, step.copies),
            ):  # fmt: skip
                for x in tensors.values():
                    for source, target in copies:
                        x[target] = x[source]
        return step

    def _write(self, step: Step, state: GrowingState) -> None:
        table, tokens = step.pages(self.paging, self.device).table, state.tokens
        for n, row in enumerate(step.write):
            of_sequence = state.select([n]).tensors()
            begin = 0 if self.form.window is None else max(tokens[n] - self.form.window, 0)
            for name, pages in self.pages.items():
                stride = self.form.growing[name].stride
                of_strides, held = table.strided(stride), (tokens[n] - begin) // stride
                pages.flatten(0, 1)[of_strides.places([n], [begin], held)[0]] = of_sequence[name][0]
            for name, fixed in self.fixed.items():
                fixed[row] = of_sequence[name][0]

    def check_form(self, state: GrowingState) -> None:
        value = state.value() if isinstance(state, GrowingState) else state
        if not isinstance(value, GrowingValue):
            raise ShapeError(f"the pool is of a softmax mixer; got a state of kind {state.kind!r}")
        self._check_form(value)

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


class PagedState(PooledState, GrowingState):
    """The sequences of some slots of a pool as a state."""

    def __init__(self, pool: PagedPool, batch: Batch) -> None:
        super().__init__(pool, batch)
        self.pool = pool

    @property
    def form(self) -> GrowingForm:  # type: ignore[override]
        return self.pool.form

    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        self.check_input(x)
        return _PagedGrowth(self, x, seqs)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.pool.pages[name].dtype

    def held(self, name: str) -> Paged:
        """The entries of that name."""
        self.check_current()
        table = self.batch.table(self.pool.paging).strided(self.form.growing[name].stride)
        return Paged(self.pool.pages[name], table)

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
        # A copy: the rows are about to be written.
        return self.pool.fixed[name][self.batch.where(self.pool.device)].clone()

    def value(self) -> GrowingValue:
        window = self.form.window

        def rows(name: str) -> Rows:
            held = self.held(name)
            found = [row_of(held, n, window) for n in range(self.count)]
            return tuple(GrowingTensor(x, window) for x in ([torch.cat(found)] if self.alike else found))

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
        of_sequence = sum(x[0].nbytes for x in self.pool.fixed.values())
        window = self.form.window
        kept = [seen if window is None else min(seen, window) for seen in self.tokens]
        growing = sum(
            pages[0, 0].nbytes * sum(n // self.form.growing[name].stride for n in kept)
            for name, pages in self.pool.pages.items()
        )
        return growing + self.count * of_sequence

    def joined(self, states: Sequence[State]) -> GrowingState:  # type: ignore[override]
        there = [state for state in states if isinstance(state, PagedState) and state.pool is self.pool]
        batch = self.batch.joined([state.batch for state in there]) if len(there) == len(states) else None
        return self.value().joined(states) if batch is None else PagedState(self.pool, batch)

    def check_truncated(self, tokens: Sequence[int]) -> None:
        super().check_truncated(tokens)
        self.check_current()
        for slot, n in zip(self.slots, tokens, strict=True):
            self.pool.paging.check_shorter(slot, n)

    def truncated(self, tokens: Sequence[int]) -> PagedState:
        """The view after the sequences went back, in the pool, and in all that share its books."""
        # Whether the sequences can is asked once, of the batch: after the first layer they have gone back in all.
        super().check_truncated(tokens)
        return PagedState(self.pool, self.batch.back_to(tokens))


class _PagedGrowth(Growth):
    """Some sequences of a pool while tokens are written to it."""

    def __init__(self, state: PagedState, x: Tensor, seqs: Sequences | None) -> None:
        self._state, self._pool, self._seqs = state, state.pool, seqs
        self._lengths = (x.shape[1],) * state.count if seqs is None else seqs.lengths
        state.check_current()
        paging = self._pool.paging
        # Sequences that begin look at their own tokens, as they come.
        self._fresh = not any(state.tokens)
        # More tokens than fit beside a window look at copies of what was there, and at each other where they are.
        self._beside: dict[str, list[Tensor]] | None = None
        if paging.window is not None and paging.is_large(max(self._lengths)) and not self._fresh:
            self._beside = {
                name: [row_of(state.held(name), n, paging.window) for n in range(state.count)]
                for name in self._pool.pages
            }
        self._step = self._pool.begin(state.batch, self._lengths)
        self._pages = self._step.pages(paging, self._pool.device)

    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        return tuple(self._append(name, each) for name, each in entries.items())

    def _append(self, name: str, entries: Tensor) -> Keys:
        pages, step = self._pool.pages[name], self._pages
        flat = entries.detach().flatten(0, 1)
        if step.kept is not None:
            flat = flat[step.kept]
        with torch.no_grad():
            pages.flatten(0, 1).index_copy_(0, step.places, flat.to(pages.dtype))
        if self._fresh and (self._seqs is None or self._seqs.count == 1):
            return entries
        if self._fresh or self._beside is not None:
            parts = entries.split(1) if self._seqs is None else entries.split(self._lengths, dim=1)
            if self._beside is None:
                return tuple(parts)
            both = zip(self._beside[name], parts, strict=True)
            return tuple(torch.cat([old, part.to(old.dtype)], dim=1) for old, part in both)
        return Paged(pages, step.table)

    def add(self, name: str, rows: Tensor | Sequence[Tensor]) -> Keys:
        pages, stride = self._pool.pages[name], self._pool.form.growing[name].stride
        table = self._pages.table.strided(stride)
        parts = rows.split(1) if isinstance(rows, Tensor) else rows
        with torch.no_grad():
            for n, (part, seen) in enumerate(zip(parts, self._state.tokens, strict=True)):
                if part.shape[1]:
                    places = table.places([n], [seen // stride], part.shape[1])[0]
                    pages.flatten(0, 1).index_copy_(0, places, part[0].detach().to(pages.dtype))
        if self._fresh:
            return rows if isinstance(rows, Tensor) else tuple(rows)
        return Paged(pages, table)

    def before(self, name: str) -> Keys:
        return Paged(self._pool.pages[name], self._state.batch.table(self._pool.paging))

    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> None:
        pages = self._pool.pages[name]
        with torch.no_grad():
            for n, row in enumerate(rows):
                if row is not None:
                    places = self._pages.table.places([n], [0], row.shape[1])[0]
                    pages.flatten(0, 1).index_copy_(0, places, row[0].detach().to(pages.dtype))

    def fix(self, name: str, content: Tensor) -> None:
        fixed = self._pool.fixed[name]
        with torch.no_grad():
            fixed[self._step.where(self._pool.device)[1]] = content.detach().to(fixed.dtype)

    def end(self) -> GrowingState:
        return PagedState(self._pool, self._step.after)
