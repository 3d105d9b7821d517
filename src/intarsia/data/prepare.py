"""Tokenising a corpus, once."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from intarsia.data.build_once import build_once, slug
from intarsia.data.dataset import (
    FORMAT,
    META_FILE,
    TOKENIZER_DIRECTORY,
    SplitFiles,
    TokenDataset,
    is_complete,
    token_type,
)
from intarsia.data.documents import SPLITS, Corpus, Document, Split, digest
from intarsia.data.tokenizer_base import Tokenizer
from intarsia.errors import DataError
from intarsia.files import write_json

# Enough to keep every core of a tokenizer busy, little enough to have no weight in memory.
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, directory: str | os.PathLike[str], progress: bool = True
) -> TokenDataset:
    """Tokenise a corpus into a directory of its own under `directory`, or find it there.

    The directory's name holds the fingerprints of the corpus and of the tokenizer, so a change of either
    makes another one. It appears when it is complete; a crash leaves none. Several processes may call this at
    once: one works, the others wait for it. Only one batch of the corpus is in memory at a time.

    Args:
        progress: show a progress bar on the standard error.

    Raises:
        DataError: the corpus cannot be read, leaves a split without a document, or the directory cannot be
            written to.
    """
    key = digest("dataset", FORMAT, corpus.fingerprint(), tokenizer.fingerprint())
    target = Path(directory) / f"{slug(corpus.name)}-{slug(tokenizer.name)}-{key[:16]}"
    build_once(target, lambda partial: _tokenise(corpus, tokenizer, partial, progress), is_complete)
    return TokenDataset(target)


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, directory: Path, progress: bool) -> None:
    dtype = token_type(tokenizer.vocab_size)
    with ExitStack() as stack:
        bar = stack.enter_context(_progress_bar(progress))
        task = bar.add_task(f"Tokenising {corpus.name}", total=corpus.total_bytes())
        writers = {
            split: stack.enter_context(_SplitWriter(SplitFiles(directory, split), tokenizer.separator, dtype))
            for split in SPLITS
        }
        for batch in _batches(corpus.documents()):
            encoded = tokenizer.encode_arrays([document.text for document in batch], dtype)
            for document, tokens in zip(batch, encoded, strict=True):
                writers[document.split].write(tokens, len(document.text.encode()))
            bar.advance(task, sum(document.source_bytes for document in batch))
        bar.update(task, completed=corpus.total_bytes())
    _check(corpus, writers)
    tokenizer.save(directory / TOKENIZER_DIRECTORY)
    write_json(
        directory / META_FILE,
        {
            "format": FORMAT,
            "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint()},
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()},
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.separator,
            "dtype": f"uint{8 * dtype.itemsize}",
            "splits": {split: writer.counts() for split, writer in writers.items()},
        },
    )


def _check(corpus: Corpus, writers: dict[Split, _SplitWriter]) -> None:
    if not writers["heldout"].documents and corpus.heldout:
        raise DataError(
            f"the corpus {corpus.name!r} is a single document, so nothing can be held out of training: "
            "give more text, have it cut into smaller documents (document_bytes), or hold nothing out "
            "(heldout=0)"
        )
    if not writers["train"].documents:
        raise DataError(
            f"the corpus {corpus.name!r} has no training document: give more text or lower heldout"
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),  # a pattern may have brackets
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )


class _SplitWriter:
    """Writes the files of a split, document by document."""

    def __init__(self, files: SplitFiles, separator: int, dtype: np.dtype) -> None:
        self._files = files
        self._separator = np.array([separator], dtype=dtype)
        self._offsets = array("q", [0])
        self._text_bytes = array("q")
        self._hash = hashlib.sha256()
        self._stream = files.tokens.open("wb")

    @property
    def documents(self) -> int:
        return len(self._text_bytes)

    def write(self, tokens: NDArray, text_bytes: int) -> None:
        self._put(self._separator)
        self._put(tokens)
        self._offsets.append(self._offsets[-1] + 1 + len(tokens))
        self._text_bytes.append(text_bytes)

    def counts(self) -> dict[str, Any]:
        """The split's part of the description; to be asked for once, when all is written."""
        for counts in (self._offsets, self._text_bytes):
            self._hash.update(np.asarray(counts, dtype="<i8").tobytes())
        return {
            "documents": self.documents,
            "tokens": self._offsets[-1],
            "text_bytes": sum(self._text_bytes),
            "fingerprint": self._hash.hexdigest(),
        }

    def _put(self, tokens: NDArray) -> None:
        content = tokens.tobytes()
        self._stream.write(content)
        self._hash.update(content)

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stream:
            if error is None:
                self._put(self._separator)
        if error is None:
            self._files.offsets.write_bytes(np.asarray(self._offsets, dtype="<i8").tobytes())
            self._files.text_bytes.write_bytes(np.asarray(self._text_bytes, dtype="<i8").tobytes())
