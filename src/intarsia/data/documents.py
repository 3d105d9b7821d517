"""What a corpus is: documents, without duplicates, each in the training or in the held-out split."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, get_args

from intarsia.errors import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

DEFAULT_HELDOUT = 0.05

# A corpus of so many documents has a held-out one but for a chance of (1 - heldout) ** 4096.
_SPLIT_LOOKAHEAD = 4096


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        id: names the document within its corpus, such as a relative path and a line number.
        text: the text; always encodable as UTF-8.
        split: "train" or "heldout".
        source_bytes: how much of `Corpus.total_bytes()` has been read since the document before.
    """

    id: str
    text: str
    split: Split = "train"
    source_bytes: int = 0


class Corpus(ABC):
    """A source of documents, the same ones in the same order each time it is read.

    Documents of equal text are given once. The split of a document follows from its text alone (see
    `assign_splits`), so adding files to a corpus moves no document from one split to the other.
    """

    def __init__(self, name: str, *, limit_bytes: int | None, heldout: float) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise DataError(
                f"limit_bytes must be positive, not {limit_bytes}; leave it out for all of the corpus"
            )
        if not 0 <= heldout < 1:
            raise DataError(
                f"heldout is the share of documents held out, at least 0 and below 1, not {heldout}"
            )
        self.name = name
        self.limit_bytes = limit_bytes
        self.heldout = heldout

    @abstractmethod
    def candidates(self) -> Iterator[Document]:
        """All documents within the limit, in a fixed order, duplicates and empty ones included."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digits that change when the documents or their splits may have changed."""

    @abstractmethod
    def total_bytes(self) -> int | None:
        """The sum of `source_bytes` that reading everything will give, or None where nobody knows."""

    @abstractmethod
    def limited(self, limit_bytes: int) -> Corpus:
        """A smaller corpus whose training documents are among this one's training documents."""

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        """The documents of one split, or of both.

        Raises:
            DataError: the source cannot be read, or holds no text at all.
        """
        if split is not None and split not in SPLITS:
            raise DataError(f"a split is 'train' or 'heldout', not {split!r}")
        return self._documents(split)

    def _documents(self, split: Split | None) -> Iterator[Document]:
        empty = True
        for document in assign_splits(_unique(self.candidates()), self.heldout):
            empty = False
            if split is None or document.split == split:
                yield document
        if empty and self.limit_bytes is not None and self._holds_text():
            raise DataError(
                f"no document of {self.name!r} fits into limit_bytes={self.limit_bytes}: raise it"
            )
        if empty:
            raise DataError(f"the corpus {self.name!r} holds no text")

    def _holds_text(self) -> bool:
        """Whether there is any text, limit or no limit."""
        whole = copy.copy(self)
        whole.limit_bytes = None
        whole.__dict__.pop("files", None)  # a cached property, made with the limit
        return any(document.text.strip() for document in whole.candidates())


def text_hash(text: str) -> int:
    """A 64-bit hash of a text, uniformly distributed and the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def valid_unicode(text: str) -> str:
    r"""Join pairs of surrogates and replace lone ones (JSON's "\ud800"), which UTF-8 cannot express."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def digest(*parts: object) -> str:
    """Hex digits of a SHA-256 over the `repr` of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _unique(documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
    """Pairs of hash and document, with empty and repeated documents left out."""
    seen: set[int] = set()
    skipped = 0
    for document in documents:
        key = text_hash(document.text)
        if key in seen or not document.text.strip():
            skipped += document.source_bytes
            continue
        seen.add(key)
        if skipped:
            document = replace(document, source_bytes=document.source_bytes + skipped)
            skipped = 0
        yield key, document


def assign_splits(documents: Iterable[tuple[int, Document]], heldout: float) -> Iterator[Document]:
    """Put each document in a split by its hash, in one pass.

    A document is held out if its hash, as a fraction of 2**64, is below `heldout`. A small corpus may fall
    wholly on one side: then the smallest hash is held out, or the largest is not. So both splits have a
    document as soon as there are two (and `heldout` is not 0). Only the first few documents wait for that.
    """
    boundary = int(heldout * 2**64)
    stream = iter(documents)
    waiting: list[tuple[int, Document]] = []
    if boundary:
        sides: set[bool] = set()
        for key, document in stream:
            waiting.append((key, document))
            sides.add(key < boundary)
            if len(sides) == 2 or len(waiting) == _SPLIT_LOOKAHEAD:
                break
        else:
            boundary = _boundary_of_few([key for key, _ in waiting], boundary)
    for key, document in chain(waiting, stream):
        yield replace(document, split="heldout" if key < boundary else "train")


def _boundary_of_few(keys: list[int], boundary: int) -> int:
    """The boundary for a corpus whose keys are all on one side of `boundary`."""
    if len(keys) < 2:
        return 0  # a single document is needed for training
    return min(keys) + 1 if min(keys) >= boundary else max(keys)
