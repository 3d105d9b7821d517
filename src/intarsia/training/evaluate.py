"""The likelihood of held-out documents, each by itself."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from intarsia.data import Tokenizer, TokenSplit
from intarsia.data.tokenizer_base import ByteLevelTokenizer
from intarsia.errors import ConfigError, DataError
from intarsia.files import write_atomically
from intarsia.model import InferenceModel, LanguageModel
from intarsia.ops import Sequences
from intarsia.training.config import Precision
from intarsia.training.distributed import Processes

ARRAYS = ("documents", "nll", "tokens", "text_bytes", "position_nll", "position_tokens")
"""The arrays of an evaluation, as its file has them."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model makes of some documents; arrays are `[documents]` where they do not say otherwise."""

    documents: NDArray[np.int64]
    """Their numbers in the split."""
    nll: NDArray[np.float64]
    """Negative log-likelihood of all targets of a document, its end included; natural logarithm."""
    tokens: NDArray[np.int64]
    """Targets."""
    text_bytes: NDArray[np.int64]
    """UTF-8 bytes of the text."""
    position_nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Negative log-likelihood of all targets by their position in their piece, `[positions]` in octaves: 0, 1, 2 to 3,
    4 to 7, ... Not `[documents]`, nor is the next."""
    position_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Targets at those positions."""

    def __post_init__(self) -> None:
        if not len(self.documents) == len(self.nll) == len(self.tokens) == len(self.text_bytes):
            raise ConfigError("an evaluation needs one number of each kind per document")

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of text: the measure that does not depend on the tokenizer."""
        return float(self.nll.sum() / math.log(2) / self.text_bytes.sum())

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood of a target, in nats: comparable with the training loss."""
        return float(self.nll.sum() / self.tokens.sum())

    def summary(self) -> dict[str, float | int]:
        """The sums and what follows from them, JSON-able."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "nll_per_token": self.nll_per_token,
            "documents": len(self.documents),
            "tokens": int(self.tokens.sum()),
            "text_bytes": int(self.text_bytes.sum()),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays as `.npz`, atomically."""
        with write_atomically(path) as file:
            np.savez(file, **{name: getattr(self, name) for name in ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or holds something else.
        """
        try:
            with np.load(Path(path)) as arrays:
                return cls(*(arrays[name] for name in ARRAYS))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise DataError(f"cannot read the evaluation {path}: {error}") from error


def first_documents(split: TokenSplit, count: int | None = None, text_bytes: int | None = None) -> range:
    """The first `count` documents of a split, as far as they have `text_bytes` of text together; at least
    one.

    The order of a split is fixed, so the same documents are taken each time.
    """
    most = split.documents if count is None else min(count, split.documents)
    if text_bytes is not None:
        fitting = int(np.searchsorted(np.cumsum(split.text_bytes), text_bytes, side="right"))
        most = min(most, max(fitting, 1))
    return range(most)


def document_numbers(split: TokenSplit, documents: Sequence[int] | None) -> NDArray[np.int64]:
    """The documents of a split to evaluate on, all by default, as an array.

    Raises:
        DataError: there are none, or one of them is not in the split.
    """
    numbers = np.arange(split.documents) if documents is None else np.asarray(documents, dtype=np.int64)
    if not len(numbers):
        raise DataError(f"the split {split.name!r} has no documents to evaluate on")
    if numbers.min() < 0 or numbers.max() >= split.documents:
        raise DataError(f"the split {split.name!r} has {split.documents} documents, and no {numbers.max()}")
    return numbers


@torch.no_grad()
def evaluate(
    model: LanguageModel | InferenceModel,
    split: TokenSplit,
    *,
    length: int,
    documents: Sequence[int] | None = None,
    tokens_per_document: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch_tokens: int = 8192,
    precision: Precision = "float32",
    processes: Processes | None = None,
) -> Evaluation:
    """The negative log-likelihood of each document.

    Documents longer than `length` are cut into pieces of `length`, and each piece is read from nothing, as in
    training; so every byte is scored once. Pieces are packed into batches in their order, which is the same
    however often this is called. The model is left in the mode that it was in.

    Args:
        model: on its device; divided among processes or not; or one that was made ready for inference, which tells
            what packed weights cost.
        split: where the documents are.
        length: tokens of a piece.
        documents: the numbers of the documents; all by default.
        tokens_per_document: score the first so many tokens of each document alone. The text of a document is
            then what those tokens say, which needs the `tokenizer`.
        batch_tokens: tokens of one forward pass, at least those of one piece.
        precision: as in training.
        processes: those that evaluate together; all of them call this, and all get the whole result.

    Raises:
        ConfigError: a number is out of range, or `tokens_per_document` comes without the tokenizer.
        DataError: there are no documents, or one of them is not in the split.
    """
    model = model.model if isinstance(model, InferenceModel) else model
    processes = processes or Processes(device=next(model.parameters()).device)
    for name, value in (
        ("length", length),
        ("batch_tokens", batch_tokens),
        ("tokens_per_document", tokens_per_document),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    chosen = document_numbers(split, documents)
    tokens = split.lengths[chosen]
    if tokens_per_document is not None:
        tokens = np.minimum(tokens, tokens_per_document)

    batches = list(_batches(tokens, length, max(batch_tokens, length)))
    nll = torch.zeros(len(chosen), dtype=torch.float64)
    by_position = torch.zeros(2, length.bit_length() + 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(batches), processes.world_size):
            # Every process takes part in each round, if only for the weights that it holds for the others.
            mine = start + processes.rank
            pieces = batches[mine if mine < len(batches) else 0]
            scored = _score(model, split, chosen, pieces, precision, processes.device)
            if mine < len(batches):
                totals = torch.stack([part.sum() for part in scored])
                nll.index_add_(0, torch.tensor([piece.place for piece in pieces]), totals.cpu())
                _add_by_position(by_position, [part.cpu() for part in scored])
    finally:
        model.train(was_training)
    total = processes.sum(nll.to(processes.device)).cpu()
    sums, counts = processes.sum(by_position.to(processes.device)).cpu().numpy()
    return Evaluation(
        documents=chosen,
        nll=total.numpy(),
        tokens=tokens,
        text_bytes=scored_bytes(split, chosen, tokens, tokenizer),
        position_nll=sums,
        position_tokens=counts.astype(np.int64),
    )


@dataclass(frozen=True)
class _Piece:
    """The inputs `start` to `stop` of the document at `place` in the list of documents."""

    place: int
    start: int
    stop: int


def _batches(tokens: NDArray[np.int64], length: int, batch_tokens: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for place, count in enumerate(tokens.tolist()):
        for start in range(0, count, length):
            stop = min(start + length, count)
            if size + stop - start > batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append(_Piece(place, start, stop))
            size += stop - start
    yield batch


def _score(
    model: LanguageModel,
    split: TokenSplit,
    documents: NDArray[np.int64],
    pieces: list[_Piece],
    precision: Precision,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """The negative log-likelihood of each target of each piece, float64."""
    numbers = [int(documents[piece.place]) for piece in pieces]
    pairs = list(zip(numbers, pieces, strict=True))
    inputs = np.concatenate([split.document(number)[piece.start : piece.stop] for number, piece in pairs])
    targets = np.concatenate([split.targets(number)[piece.start : piece.stop] for number, piece in pairs])
    lengths = tuple(piece.stop - piece.start for piece in pieces)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        out = model(
            torch.from_numpy(inputs.astype(np.int64))[None].to(device),
            targets=torch.from_numpy(targets.astype(np.int64))[None].to(device),
            seqs=Sequences(lengths),
        )
    return out.nll[0].double().split(lengths)


def _add_by_position(totals: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Add the losses and the number of targets of each octave of positions to `totals` [2, octaves]."""
    values = torch.cat(list(pieces))
    # frexp's exponent is the number of binary digits: 0, 1, 2 to 3, 4 to 7, ...
    octaves = torch.cat([torch.frexp(torch.arange(len(piece), dtype=torch.float64))[1] for piece in pieces])
    totals[0].index_add_(0, octaves.long(), values)
    totals[1].index_add_(0, octaves.long(), torch.ones_like(values))


def scored_bytes(
    split: TokenSplit, documents: NDArray[np.int64], tokens: NDArray[np.int64], tokenizer: Tokenizer | None
) -> NDArray[np.int64]:
    """The bytes of text that the first `tokens` targets of each document say; int64 `[documents]`."""
    text_bytes = split.text_bytes[documents]
    for place in np.flatnonzero(tokens < split.lengths[documents]):
        if tokenizer is None:
            raise ConfigError("tokens_per_document needs the tokenizer, to know how much text the tokens are")
        # The targets are what is scored: the separator in front is no text.
        scored = split.targets(int(documents[place]))[: tokens[place]].tolist()
        if isinstance(tokenizer, ByteLevelTokenizer):
            text_bytes[place] = len(tokenizer.decode_bytes(scored))
        else:
            text_bytes[place] = len(tokenizer.decode(scored).encode())
    return text_bytes
