"""Batches for training, the same ones however many processes share them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from intarsia.data.dataset import TokenSplit
from intarsia.data.packing import Packing, Segment
from intarsia.errors import ConfigError, DataError
from intarsia.ops.sequences import Sequences


@dataclass(frozen=True)
class Batch:
    """One process' part of a batch.

    Attributes:
        tokens: inputs, int64 `[1, rows * length]`.
        targets: the token that follows each input in its document, int64, same shape. All count.
        seqs: the pieces of documents that lie end to end in `tokens`.
        text_bytes: UTF-8 bytes of text behind the tokens. A piece has its document's bytes in proportion,
            rounded such that the pieces of a document add up.
        digest: SHA-256 of the batch of all processes together, inputs, targets and lengths.
        epoch: the pass through the data in which the batch starts, from 0.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    seqs: Sequences
    text_bytes: int
    digest: str
    epoch: int


class BatchLoader:
    """Packs the documents of a split into batches, endlessly.

    Documents are shuffled every epoch and laid end to end, and rows of `length` tokens are cut from that, so
    there is no padding, and every token of an epoch comes once. A row starts a new sequence, and so does each
    document in it; a document that a row cuts goes on in another row as a new sequence. The order of rows is
    shuffled too, within an epoch.

    The batch of a step, over all processes, depends on the split, `seed`, the step, `length` and
    `rows * world_size` alone; process `rank` gets the `rank`-th `rows` rows of it. The position is one
    number, and going to it costs no more than the shuffle of one epoch.

    Args:
        split: the training split of a dataset.
        rows: rows of this process in each batch.
        length: tokens in a row.
        seed: of the order of the data.
        rank, world_size: which process this is, of how many.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the split is smaller than one batch.
    """

    def __init__(
        self, split: TokenSplit, *, rows: int, length: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        for name, value, least in (
            ("rows", rows, 1),
            ("length", length, 1),
            ("world_size", world_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be at least 0 and below world_size={world_size}, not {rank}")
        if split.tokens < rows * world_size * length:
            raise DataError(
                f"the split {split.name!r} has {split.tokens} tokens, fewer than one batch of "
                f"{rows * world_size} rows of {length}: give more text, or take fewer or shorter rows"
            )
        self._split = split
        self._rows = rows
        self._global_rows = rows * world_size
        self._length = length
        self._seed = seed
        self._rank = rank
        self._packing = Packing(split.lengths, length, seed)
        self._step = 0

    @property
    def step(self) -> int:
        """How many batches have been given."""
        return self._step

    @property
    def epochs(self) -> float:
        """How many passes through the split the batches so far make."""
        return self._step * self._global_rows * self._length / self._split.tokens

    def next(self) -> Batch:
        """The next batch."""
        first = self._step * self._global_rows
        rows = [list(self._packing.row(number)) for number in range(first, first + self._global_rows)]
        segments = [segment for row in rows for segment in row]
        # Little-endian 32-bit whatever the stored type, so that equal tokens have equal digests everywhere.
        tokens = np.concatenate(
            [self._split.document(s.document)[s.start : s.stop] for s in segments]
        ).astype("<u4")
        targets = np.concatenate(
            [self._split.targets(s.document)[s.start : s.stop] for s in segments]
        ).astype("<u4")
        digest = hashlib.sha256(np.array([s.stop - s.start for s in segments], dtype="<i8").tobytes())
        digest.update(tokens.tobytes())
        digest.update(targets.tobytes())
        own = [
            segment
            for row in rows[self._rank * self._rows : (self._rank + 1) * self._rows]
            for segment in row
        ]
        part = slice(self._rank * self._rows * self._length, (self._rank + 1) * self._rows * self._length)
        batch = Batch(
            tokens=torch.from_numpy(tokens[part].astype(np.int64)).unsqueeze(0),
            targets=torch.from_numpy(targets[part].astype(np.int64)).unsqueeze(0),
            seqs=Sequences(tuple(segment.stop - segment.start for segment in own)),
            text_bytes=sum(map(self._text_bytes, own)),
            digest=digest.hexdigest(),
            epoch=self._packing.epoch_of(first),
        )
        self._step += 1
        return batch

    def _text_bytes(self, segment: Segment) -> int:
        length = int(self._split.lengths[segment.document])
        total = int(self._split.text_bytes[segment.document])
        return total * segment.stop // length - total * segment.start // length

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain numbers and strings."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position. The number of processes may differ, as long as `rows * world_size` is the same.

        Raises:
            DataError: the state is of other data, or of batches of another shape or seed.
        """
        for name, value in self._identity().items():
            if name not in state:
                raise DataError(f"this is no state of a batch loader: it has no {name!r}")
            if state[name] != value:
                what = (
                    "the data have changed"
                    if name == "fingerprint"
                    else f"{name} was {state[name]} and is {value}"
                )
                raise DataError(f"cannot go on with the data where the checkpoint left: {what}")
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise DataError(f"this is no state of a batch loader: its step is {step!r}")
        self._step = step

    def _identity(self) -> dict[str, Any]:
        return {
            "version": 1,
            "fingerprint": self._split.fingerprint,
            "seed": self._seed,
            "global_rows": self._global_rows,
            "length": self._length,
        }
