"""Decoding without the host in between: the step of a batch is recorded once and then only played.

On a GPU a token of a small batch takes as long as the host needs to start some thousand kernels; a CUDA graph starts
them all at once. It does the same with the same memory every time, so what differs from step to step (the tokens, whose
they are, where their states lie and how long they are) is copied into tensors that it reads. For batches of so many
sequences and texts of so many pages there is a recording each, made when it is needed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.layers.batch import Batch, batch_of
from intarsia.layers.growing import PagedPool
from intarsia.layers.paging import PageStep, Paging
from intarsia.layers.pools import Pool
from intarsia.layers.recorded import Places, RecordedBoards, RecordedEntries
from intarsia.layers.recurrent import RecurrentPool
from intarsia.layers.states import State
from intarsia.model.inference_model import InferenceModel
from intarsia.model.language_model import LanguageModel
from intarsia.model.states import ModelPool, ModelStates
from intarsia.ops.sequences import placed

FIRST_COLUMNS = 4
"""The fewest pages of a sequence that a recording looks at."""


class Recorder(Protocol):
    """What makes of a step something that can be played again."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does as `step` does, with the same tensors, as often as it is called. `step` may be run meanwhile."""
        ...


class Plainly:
    """Records nothing: to play a step is to call it. For devices that have no graphs."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself, which is run once: what cannot be is said now."""
        step()
        return step


class CudaGraphs:
    """Records steps as CUDA graphs, which share the memory for what they compute in between."""

    def __init__(self) -> None:
        self._memory: Any = None

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a graph. It is run three times before, for all that is made when something runs first."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            step()
        self._memory = graph.pool()
        return graph.replay


class RecordedModel:
    """A language model that decodes by recorded steps, on states in a pool of its own.

        decoder = RecordedModel(model, slots=64, tokens=64 * 4096)
        slot = decoder.pool.take()
        decoder.read(slot, prompt)                     # as the model reads, not recorded
        logits = decoder.step([slot], tokens)          # recorded
        logits = decoder.step([slot])                  # with the most likely token after the last logits

    Sequences come and go between steps through `pool`, as in any pool; its highest slot is taken, for the rows of a
    recording that have no sequence. Not for several threads at once.

    Attributes:
        pool: the states of the sequences.
        recordings: how many steps there are recorded.
    """

    def __init__(
        self,
        model: LanguageModel | InferenceModel,
        slots: int,
        tokens: int = 0,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode; its weights are read where they are.
            slots: of the sequences that there may be at once.
            tokens: that layers whose states grow have room for, of all sequences together.
            recorder: `CudaGraphs()` on a GPU and else `Plainly()` by default.

        Raises:
            UnsupportedError: a layer does with its state what cannot be recorded.
        """
        self.model = model.model if isinstance(model, InferenceModel) else model
        device = self.model.embed.weight.device
        default: Recorder = CudaGraphs() if device.type == "cuda" else Plainly()
        self._recorder = default if recorder is None else recorder
        self._batches = sorted({*(1 << i for i in range((slots - 1).bit_length())), slots})
        self._device, self._recorded = device, dict[tuple[int, ...], _Recording]()
        self.pool: ModelPool = self.model.new_pool(slots + 1, tokens)
        self._next = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        nobody = self.pool.take(slots)
        with torch.inference_mode():
            self._nobody = _next_places(self.pool, batch_of(self.pool.books, (nobody,)))
            self._recording(1, self._nobody)

    @property
    def recordings(self) -> int:
        """How many steps there are recorded."""
        return len(self._recorded)

    def read(self, slot: int, tokens: Sequence[int] | Tensor) -> Tensor:
        """Let the sequence of a slot go on by some tokens, not recorded; the logits after them, `[V]`."""
        row = torch.as_tensor(tokens, dtype=torch.int64, device=self._device).view(1, -1)
        with torch.inference_mode():
            output = self.model(row, states=self.pool.view([slot]), last_only=True)
            logits: Tensor = output.logits[0, -1]
            self._next[slot] = logits.argmax()
            return logits

    def step(self, slots: Sequence[int], tokens: Sequence[int] | Tensor | None = None) -> Tensor:
        """The logits after one more token of each sequence.

        Args:
            slots: of the sequences, in any order.
            tokens: of each, `[N]`; the most likely one after its last logits by default, which nobody waits for.

        Returns:
            `[N, V]` float32. The next step of as many sequences writes there.

        Raises:
            ConfigError: a slot that holds no sequence or stands there twice, or not as many tokens.
            PoolError: there are too few pages. Nothing has been written then.
        """
        slots = tuple(slots)
        with torch.inference_mode():
            if tokens is not None:
                given = torch.as_tensor(tokens, dtype=torch.int64)
                if given.shape != (len(slots),):
                    raise ConfigError(
                        f"a step takes a token of each of {len(slots)} sequences; got {list(given.shape)}"
                    )
            if len(slots) > self._batches[-1] or self.pool.slots - 1 in slots:
                raise ConfigError(
                    f"a step is of {self._batches[-1]} sequences at most, in the slots before {self.pool.slots - 1}; "
                    f"got {list(slots)}"
                )
            # Everything that can be wrong with the slots or the room is said before anything is written.
            places = _next_places(self.pool, batch_of(self.pool.books, slots))
            if tokens is not None:
                self._next[placed(torch.tensor(slots), self._device)] = placed(given, self._device)
            recording = self._recording(len(slots), places)
            recording.fill(places, self._nobody)
            recording.play()
            return recording.logits[: len(slots)]

    def _recording(self, count: int, places: _HostPlaces) -> _Recording:
        batch = next(n for n in self._batches if n >= count)
        columns = tuple(
            pages.columns
            if pages.window is not None
            else 1 << (max(pages.columns, FIRST_COLUMNS) - 1).bit_length()
            for pages in places.pages
        )
        key = (batch, *columns)
        if key not in self._recorded:
            self._recorded[key] = _Recording(self, batch, columns)
        return self._recorded[key]


@dataclass
class _HostPages:
    """Where the entries of a batch lie in the layers that share a page table, after the next token."""

    window: int | None
    entry: Tensor
    """`[N]`."""
    lengths: Tensor
    """`[N]`."""
    table: Tensor
    """`[N, columns]`."""

    @property
    def columns(self) -> int:
        return self.table.shape[1]


@dataclass
class _HostPlaces:
    """Where the next token of each sequence of a batch belongs, on the host. `[N]` int64 each."""

    slots: Tensor
    positions: Tensor
    read: Tensor
    write: Tensor
    pages: list[_HostPages]
    kinds: list[int | None]
    """Of each layer, which of the pages are its own; None for a linear one."""


def _next_places(pool: ModelPool, batch: Batch) -> _HostPlaces:
    """Let the sequences of a batch go on by a token in the books, and in the pools but for what the layers compute."""
    lengths = (1,) * batch.count
    step = batch.step(lengths)
    pages: dict[Paging, _HostPages] = {}
    for layer in pool.layers:
        if isinstance(layer, PagedPool) and layer.paging not in pages:
            in_pages = step.pages(layer.paging, torch.device("cpu"))
            pages[layer.paging] = _next_pages(layer.paging, in_pages, batch.tokens)
    numbers = {paging: n for n, paging in enumerate(pages)}
    kinds = [numbers[layer.paging] if isinstance(layer, PagedPool) else None for layer in pool.layers]
    for layer in pool.layers:
        layer.begin(batch, lengths)
    slots, seen, read, write = map(torch.tensor, (batch.slots, batch.tokens, step.read, step.write))
    return _HostPlaces(slots, seen, read, write, list(pages.values()), kinds)


def _next_pages(paging: Paging, step: PageStep, seen: tuple[int, ...]) -> _HostPages:
    lengths, table = torch.tensor(seen) + 1, step.table.pages
    if paging.window is not None:
        # Of a window the pages that it has not left, so that a long text needs no longer table.
        most = paging.window // paging.page_size + 2
        first = (lengths - paging.window).clamp(min=0) // paging.page_size
        columns = first[:, None] + torch.arange(most)
        within = columns < table.shape[1]
        table = torch.where(within, table.gather(1, columns.clamp(max=table.shape[1] - 1)), -1)
        lengths = lengths - first * paging.page_size
    return _HostPages(paging.window, step.places, lengths, table)


class _Recording:
    """The step of so many sequences, whose texts have so many pages."""

    def __init__(self, owner: RecordedModel, batch: int, columns: tuple[int, ...]) -> None:
        self._batch, self._columns, self._device = batch, columns, owner._device
        nobody = owner._nobody
        sizes = [batch] * 4
        for each in columns:
            sizes += [batch, batch, batch * each]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=owner._device)
        slots, positions, read, write, *rest = self._numbers.split(sizes)
        of_kind = [
            Places(positions, read, write, entry, lengths, table.view(batch, -1))
            for entry, lengths, table in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        ]
        states = ModelStates(
            tuple(
                _state(pool, Places(positions, read, write) if kind is None else of_kind[kind])
                for pool, kind in zip(owner.pool.layers, nobody.kinds, strict=True)
            )
        )
        model, chosen = owner.model, owner._next
        self.logits = torch.empty(batch, model.config.vocab_size, device=owner._device)

        def step() -> None:
            tokens = chosen.index_select(0, slots)
            logits = model(tokens[:, None], states=states, last_only=True).logits[:, 0]
            self.logits.copy_(logits)
            chosen.index_copy_(0, slots, logits.argmax(-1))

        # Whatever is run while it is recorded is of nobody.
        self.fill(nobody, nobody)
        self.play = owner._recorder.record(step)

    def fill(self, places: _HostPlaces, nobody: _HostPlaces) -> None:
        """Say where the next tokens belong; what is left of the batch is `nobody`'s."""
        rows = [
            self._filled(getattr(places, name), getattr(nobody, name))
            for name in ("slots", "positions", "read", "write")
        ]
        for columns, mine, others in zip(self._columns, places.pages, nobody.pages, strict=True):
            table = others.table[:, :1].repeat(self._batch, columns)
            table[: len(mine.table), : mine.columns] = mine.table
            rows += [
                self._filled(mine.entry, others.entry),
                self._filled(mine.lengths, others.lengths),
                table.view(-1),
            ]
        self._numbers.copy_(placed(torch.cat(rows), self._device))

    def _filled(self, mine: Tensor, others: Tensor) -> Tensor:
        return torch.cat([mine, others[:1].expand(self._batch - len(mine))])


def _state(pool: Pool[Any], places: Places) -> State:
    if isinstance(pool, RecurrentPool):
        return RecordedBoards(pool.room, places)
    if isinstance(pool, PagedPool):
        return RecordedEntries(pool.form, pool.pages, places)
    raise UnsupportedError(f"a {type(pool).__name__} cannot be recorded: decode with the model as it is")
