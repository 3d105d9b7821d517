"""What softmax mixers remember, as values and in pools of pages."""

from intarsia.layers.growing.form import Entry
from intarsia.layers.growing.memory import GrowingMemory
from intarsia.layers.growing.paged import PagedPool
from intarsia.layers.growing.state import GrowingState, each_sequence, laid_out
from intarsia.layers.growing.tensor import GrowingTensor
from intarsia.layers.growing.value import GrowingValue

__all__ = [
    "Entry",
    "GrowingMemory",
    "GrowingState",
    "GrowingTensor",
    "GrowingValue",
    "PagedPool",
    "each_sequence",
    "laid_out",
]
