"""Which pieces of which documents make up each row of training data.

Arithmetic on lengths alone: no tokens are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """The inputs `start` to `stop` (exclusive) of a document, as part of a row, in some epoch."""

    epoch: int
    document: int
    start: int
    stop: int


class _Epoch(NamedTuple):
    """The order of the documents in an epoch, where each ends in the stream, and the order of the rows."""

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]


class Packing:
    """An endless sequence of rows of one length, cut from an endless stream of shuffled documents.

    Every epoch the documents are shuffled and laid end to end; the epochs follow each other in the stream, so
    no row is padded and no token dropped. Rows are cut from the stream one after another, and those
    that start in one epoch are shuffled too: a long document is spread over many batches and does not fill
    one.

    Everything is a function of (lengths, row length, seed, row number). The shuffles are by raw PCG64 output,
    which NumPy guarantees to stay the same in all versions.

    Args:
        lengths: the number of inputs of each document, all positive, `[documents]`.
        row_length: tokens in a row.
        seed: not negative.
    """

    def __init__(self, lengths: NDArray[np.int64], row_length: int, seed: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._row_length = row_length
        self._seed = seed
        self.epoch_tokens = int(self._lengths.sum())
        self._epochs: dict[int, _Epoch] = {}

    def epoch_of(self, row: int) -> int:
        """The epoch in which a row starts."""
        return row * self._row_length // self.epoch_tokens

    def row(self, number: int) -> Iterator[Segment]:
        """The pieces of a row, in their order; their lengths add up to the row's."""
        epoch = self.epoch_of(number)
        first = self._first_row(epoch)
        place = first + int(self._epoch(epoch).rows[number - first])
        start = place * self._row_length - epoch * self.epoch_tokens
        wanted = self._row_length
        while wanted:
            documents, ends, _ = self._epoch(epoch)
            index = int(np.searchsorted(ends, start, side="right"))
            while wanted and index < len(documents):
                document = int(documents[index])
                done = int(self._lengths[document]) - (int(ends[index]) - start)
                piece = min(wanted, int(ends[index]) - start)
                yield Segment(epoch, document, done, done + piece)
                wanted -= piece
                start += piece
                index += 1
            epoch, start = epoch + 1, 0

    def _first_row(self, epoch: int) -> int:
        """The first row that starts in an epoch or later."""
        return -(-epoch * self.epoch_tokens // self._row_length)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # A batch touches two epochs at most, neighbours.
            self._epochs = {known: order for known, order in self._epochs.items() if abs(known - epoch) == 1}
            documents = _shuffled(len(self._lengths), self._seed, epoch, 0)
            rows = self._first_row(epoch + 1) - self._first_row(epoch)
            self._epochs[epoch] = _Epoch(
                documents, np.cumsum(self._lengths[documents]), _shuffled(rows, self._seed, epoch, 1)
            )
        return self._epochs[epoch]


def _shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on the key alone."""
    keys = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(keys, kind="stable")
