"""States and pools of what a softmax mixer remembers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.layers.books import Books
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.growing.paged import PagedPool
from intarsia.layers.growing.state import GrowingState
from intarsia.layers.growing.tensor import GrowingTensor
from intarsia.layers.growing.value import GrowingValue, Rows


@dataclass(frozen=True)
class GrowingMemory(GrowingForm):
    """What a softmax mixer remembers of one sequence, in shapes, and how that begins."""

    def new_state(self, count: int, like: Tensor) -> GrowingState:
        """The state of `count` sequences that have not begun, where the weight `like` is."""
        growing: dict[str, Rows] = {
            name: (GrowingTensor(entry.new_zeros(like, count, 0), self.window),)
            for name, entry in self.growing.items()
        }
        fixed = {name: entry.new_zeros(like, count) for name, entry in self.fixed.items()}
        return GrowingValue(self, growing, fixed, (0,) * count)

    def new_pool(self, books: Books, tokens: int, like: Tensor) -> PagedPool:
        """A pool in which no sequence has begun: for `tokens` tokens of all sequences together, however they are
        divided among them; of a window for no more than a window of each slot."""
        pages = tokens // books.page_size + books.slots
        if self.window is not None:
            pages = min(pages, books.slots * (self.window // books.page_size + 3))
        return PagedPool(self, books, pages, like)
