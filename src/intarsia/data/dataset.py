"""A tokenised corpus: memory-mapped files and their description."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.data.documents import SPLITS, Split, digest
from intarsia.errors import DataError

FORMAT = 1
META_FILE = "dataset.json"
TOKENIZER_DIRECTORY = "tokenizer"

# Whole files are stored little-endian, so that they mean the same on every machine.
_TOKEN_TYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_COUNT_TYPE = np.dtype("<i8")


def token_type(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds every id of a vocabulary."""
    return _TOKEN_TYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


class SplitFiles:
    """The three files of a split: its tokens, where each document starts, how many bytes its text had.

    The tokens are `separator, t1 .. tn` of each document, end to end, and one separator after the last. So
    the inputs of a document are its part of the file, and its targets are that part moved by one.
    """

    def __init__(self, directory: Path, split: Split) -> None:
        self.tokens = directory / f"{split}.tokens"
        self.offsets = directory / f"{split}.offsets"
        self.text_bytes = directory / f"{split}.bytes"

    def sizes(self, documents: int, tokens: int, dtype: np.dtype) -> dict[Path, int]:
        """How long each file must be, in bytes."""
        return {
            self.tokens: (tokens + 1) * dtype.itemsize,
            self.offsets: (documents + 1) * _COUNT_TYPE.itemsize,
            self.text_bytes: documents * _COUNT_TYPE.itemsize,
        }


class TokenSplit:
    """The documents of one split.

    Attributes:
        name: "train" or "heldout".
        documents: how many there are.
        tokens: how many inputs they have together, a separator for each document included; as many targets.
        text_bytes: the UTF-8 bytes of each document's text, int64 `[documents]`.
        offsets: the first token of each document, int64 `[documents + 1]`.
        separator: the id that starts each document.
        vocab_size: every token is below it.
        fingerprint: hex digits of the content.
    """

    def __init__(
        self,
        directory: Path,
        name: Split,
        *,
        documents: int,
        tokens: int,
        dtype: np.dtype,
        separator: int,
        vocab_size: int,
        fingerprint: str,
    ) -> None:
        files = SplitFiles(directory, name)
        self.name = name
        self.documents = documents
        self.tokens = tokens
        self.separator = separator
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._stream: NDArray = np.memmap(files.tokens, dtype=dtype, mode="r")
        self.offsets: NDArray[np.int64] = np.fromfile(files.offsets, dtype=_COUNT_TYPE).astype(np.int64)
        self.text_bytes: NDArray[np.int64] = np.fromfile(files.text_bytes, dtype=_COUNT_TYPE).astype(np.int64)

    def document(self, index: int) -> NDArray:
        """The inputs of a document, `[separator, t1 .. tn]`, a read-only view of uint16 or uint32.

        Raises:
            IndexError: there is no such document.
        """
        index = range(self.documents)[index]
        return self._stream[self.offsets[index] : self.offsets[index + 1]]

    def targets(self, index: int) -> NDArray:
        """The targets of a document, `[t1 .. tn, separator]`, a read-only view of uint16 or uint32.

        Raises:
            IndexError: there is no such document.
        """
        index = range(self.documents)[index]
        return self._stream[self.offsets[index] + 1 : self.offsets[index + 1] + 1]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of inputs of each document, int64 `[documents]`."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return self.documents

    def __iter__(self) -> Iterator[NDArray]:
        """The inputs of each document."""
        return map(self.document, range(self.documents))

    def __repr__(self) -> str:
        return f"TokenSplit({self.name!r}, documents={self.documents}, tokens={self.tokens})"


class TokenDataset:
    """A tokenised corpus, opened from the directory in which `prepare` put it.

    Attributes:
        directory: where it is. The tokenizer is in `directory / "tokenizer"`.
        train, heldout: its splits.
        corpus, tokenizer: the names of what it was made of.
        vocab_size, separator: of the tokenizer.
        fingerprint: hex digits of its tokens; equal wherever the same texts were tokenised in the same way.

    Raises:
        DataError: the directory holds no dataset, a damaged one, or one of another version.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        meta = self.meta = _read_meta(self.directory)
        self.corpus: str = meta["corpus"]["name"]
        self.tokenizer: str = meta["tokenizer"]["name"]
        self.vocab_size: int = meta["vocab_size"]
        self.separator: int = meta["separator"]
        self.train = self._split("train")
        self.heldout = self._split("heldout")
        self.fingerprint = digest(
            self.vocab_size, self.separator, self.train.fingerprint, self.heldout.fingerprint
        )

    def _split(self, split: Split) -> TokenSplit:
        return TokenSplit(
            self.directory,
            split,
            documents=self.meta["splits"][split]["documents"],
            tokens=self.meta["splits"][split]["tokens"],
            fingerprint=self.meta["splits"][split]["fingerprint"],
            dtype=_TOKEN_TYPES[self.meta["dtype"]],
            separator=self.separator,
            vocab_size=self.vocab_size,
        )

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.directory)!r}, train={self.train!r}, heldout={self.heldout!r})"


def is_complete(directory: Path) -> bool:
    """Whether a directory holds an undamaged dataset of this version."""
    try:
        _read_meta(directory)
    except DataError:
        return False
    return True


def _read_meta(directory: Path) -> dict[str, Any]:
    """The description of a dataset whose files are as long as it says."""
    path = directory / META_FILE
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} holds no prepared dataset") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{directory} was prepared by another version of Intarsia: prepare the corpus again")
    for split in SPLITS:
        counts = meta["splits"][split]
        sizes = SplitFiles(directory, split).sizes(
            counts["documents"], counts["tokens"], _TOKEN_TYPES[meta["dtype"]]
        )
        for file, size in sizes.items():
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise DataError(f"the prepared dataset is damaged: {file} {state}; remove {directory}")
    return meta
