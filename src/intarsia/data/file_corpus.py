"""A corpus made of files on this machine."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from intarsia.data.documents import DEFAULT_HELDOUT, Corpus, Document, digest, text_hash
from intarsia.data.text_files import BinaryFileError, file_format, read_file
from intarsia.errors import DataError

DEFAULT_DOCUMENT_BYTES = 64 * 1024

# What is taken from a directory; a file that is named, or matched by a pattern, is read whatever its suffix.
_PROSE = "txt text md markdown rst tex org html htm xml csv tsv toml yaml yml ini cfg"
_CODE = (
    "py pyi c h cc cpp cxx hpp cu cuh java kt scala js jsx ts tsx go rs rb php swift sh sql lua pl r jl hs "
    "ml lean el clj ex erl zig cmake proto"
)
TEXT_SUFFIXES = frozenset(f".{suffix}" for suffix in f"{_PROSE} {_CODE}".split())
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})

_log = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """A file of the corpus; `found` says that it was found in a directory and not asked for by name."""

    id: str
    path: Path
    size: int
    modified: int
    found: bool


class FileCorpus(Corpus):
    """Text, JSON Lines (also gzipped) and Parquet files: paths, directories and patterns with `*` and `**`.

    A text file is one document, or several of at most `document_bytes` where it is longer; a record of the
    others is a document, its text in `text_field`. In a directory only files with known suffixes are taken,
    and those that turn out not to be UTF-8 are left out with a warning.

    With `limit_bytes`, files that may hold many documents give their beginnings, each in proportion to its
    size, and the small files give whole files, in the order of a hash of their names.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        limit_bytes: int | None = None,
        heldout: float = DEFAULT_HELDOUT,
        text_field: str = "text",
        document_bytes: int = DEFAULT_DOCUMENT_BYTES,
    ) -> None:
        self._paths = [
            os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        ]
        super().__init__(" ".join(self._paths), limit_bytes=limit_bytes, heldout=heldout)
        if not self._paths:
            raise DataError("no files were named")
        if document_bytes < 16:
            raise DataError(f"document_bytes must be at least 16, not {document_bytes}")
        self.text_field = text_field
        self.document_bytes = document_bytes

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """All files, each once, in the corpus' order."""
        named: dict[Path, bool] = {}
        for given in self._paths:
            for match, found in _expand(given):
                named[match] = named.get(match, True) and found
        root = os.path.commonpath([path.parent for path in named])
        files = []
        for path, found in named.items():
            stat = path.stat()
            name = path.relative_to(root).as_posix()
            files.append(SourceFile(name, path, stat.st_size, stat.st_mtime_ns, found))
        return tuple(sorted(files, key=lambda file: (text_hash(ascii(file.id)), file.id)))

    def candidates(self) -> Iterator[Document]:
        if self.limit_bytes is None:
            for file in self.files:
                yield from self._read(file)
            return
        total = max(1, self._size())
        small = []
        for file in self.files:
            if self._holds_many(file):
                yield from _within(self._read(file), self.limit_bytes * file.size // total)
            else:
                small.append(file)
        share = self.limit_bytes * sum(file.size for file in small) // total
        yield from _within(chain.from_iterable(map(self._read, small)), share)

    def fingerprint(self) -> str:
        options = (self.limit_bytes, self.heldout, self.text_field, self.document_bytes)
        return digest("files", 1, options, [(file.id, file.size, file.modified) for file in self.files])

    def total_bytes(self) -> int:
        if self.limit_bytes is None:
            return self._size()
        packed = any(file_format(file.path) != ("text", False) for file in self.files)
        return self.limit_bytes if packed else min(self.limit_bytes, self._size())

    def limited(self, limit_bytes: int) -> FileCorpus:
        limit = limit_bytes if self.limit_bytes is None else min(limit_bytes, self.limit_bytes)
        return FileCorpus(
            self._paths,
            limit_bytes=limit,
            heldout=self.heldout,
            text_field=self.text_field,
            document_bytes=self.document_bytes,
        )

    def _size(self) -> int:
        return sum(file.size for file in self.files)

    def _holds_many(self, file: SourceFile) -> bool:
        return file_format(file.path) != ("text", False) or file.size > self.document_bytes

    def _read(self, file: SourceFile) -> Iterator[Document]:
        try:
            for text in read_file(file.path, text_field=self.text_field, document_bytes=self.document_bytes):
                yield Document(file.id + text.place, text.text, source_bytes=text.source_bytes)
        except BinaryFileError as error:
            if not file.found:
                raise
            _log.warning("left out: %s", error)


def _within(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """The first documents whose texts together have at most `limit` bytes."""
    for document in documents:
        size = len(document.text.encode())
        limit -= size
        if limit < 0:
            return
        yield replace(document, source_bytes=size)


def _expand(path: str) -> Iterator[tuple[Path, bool]]:
    """The files that a path, a directory or a pattern stands for, and whether a directory gave them."""
    if not path:
        raise DataError("the path of a corpus is empty")
    plain = Path(path).expanduser()
    try:
        if plain.is_dir():
            files = list(_walk(plain))
            if not files:
                known = " ".join(sorted(TEXT_SUFFIXES | RECORD_SUFFIXES))
                raise DataError(
                    f"the directory {path} holds no text (looked for {known}); name the files by a pattern"
                )
            yield from ((_absolute(file), True) for file in files)
        elif plain.exists():
            if not plain.is_file():
                raise DataError(f"{path} is neither a file nor a directory")
            yield _absolute(plain), False
        elif glob.has_magic(path):
            matches = [Path(match) for match in glob.glob(str(plain), recursive=True)]
            files = [match for match in matches if match.is_file()]
            if not files:
                raise DataError(f"no file matches {path!r}")
            yield from ((_absolute(file), False) for file in files)
        else:
            raise DataError(
                f"there is no file or directory {path!r}; a corpus is 'python', 'python-stdlib', "
                "files, a pattern such as 'texts/**/*.txt', or 'hf:NAME'"
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # without "..", but through symbolic links


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for directory, subdirectories, names in os.walk(root, onerror=fail):
        subdirectories[:] = [
            name for name in subdirectories if not name.startswith(".") and name != "__pycache__"
        ]
        for name in names:
            suffix = Path(name.lower().removesuffix(".gz")).suffix
            if not name.startswith(".") and suffix in TEXT_SUFFIXES | RECORD_SUFFIXES:
                path = Path(directory, name)
                if path.is_file():
                    yield path
