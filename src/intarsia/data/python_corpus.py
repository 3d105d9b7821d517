"""The Python sources of this very environment: a corpus that needs no download."""

from __future__ import annotations

import os
import site
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from intarsia.data.documents import DEFAULT_HELDOUT, Corpus, Document, digest, text_hash
from intarsia.errors import DataError

# Below: empty `__init__` files and stubs. Above: tables of data that happen to be Python.
MIN_FILE_BYTES = 128
MAX_FILE_BYTES = 256 * 1024

_SKIPPED_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages"}
# Some distributions leave the standard library's tests out; without them everybody has the same corpus.
_SKIPPED_IN_STDLIB = {"test", "tests", "idle_test"}
# Written by installers, with the paths of this machine in them, or this package itself, which changes.
_SKIPPED_PREFIXES = ("_sysconfigdata", "__editable__", "_virtualenv", "config-", "intarsia")


class PythonFile(NamedTuple):
    """A file of the corpus: its name within it, where it is, its size in bytes and the hash of its text."""

    id: str
    path: Path
    size: int
    hash: int


class PythonCorpus(Corpus):
    """Python files of the standard library and of the installed packages.

    The same on every run in the same environment. Installing a package changes "python" but not
    "python-stdlib", which is the standard library alone (without its tests) and depends on nothing but the
    version of Python and how it is distributed.

    Files are read in the order of a hash of their relative paths, so that any `limit_bytes` takes a
    well-mixed part, and reads little more than that part. Files that are not UTF-8, tiny, or huge are left
    out.
    """

    def __init__(
        self,
        *,
        stdlib_only: bool = False,
        limit_bytes: int | None = None,
        heldout: float = DEFAULT_HELDOUT,
    ) -> None:
        super().__init__(
            "python-stdlib" if stdlib_only else "python", limit_bytes=limit_bytes, heldout=heldout
        )
        self._stdlib_only = stdlib_only

    @cached_property
    def files(self) -> tuple[PythonFile, ...]:
        """The files within the limit, no two of equal text, in the corpus' order."""
        paths = dict(_stdlib_files())
        if not self._stdlib_only:
            paths.update(_package_files())
        files: list[PythonFile] = []
        seen: set[int] = set()
        total = 0
        for name in sorted(paths, key=lambda name: (text_hash(name), name)):
            text = _read(paths[name])
            if text is None:
                continue
            key = text_hash(text)
            if key in seen:
                continue
            size = len(text.encode())
            if self.limit_bytes is not None and total + size > self.limit_bytes:
                break
            seen.add(key)
            total += size
            files.append(PythonFile(name, paths[name], size, key))
        return tuple(files)

    def candidates(self) -> Iterator[Document]:
        for file in self.files:
            text = _read(file.path)
            if text is None or text_hash(text) != file.hash:
                raise DataError(f"{file.path} changed while the corpus was being read: start again")
            yield Document(file.id, text, source_bytes=file.size)

    def fingerprint(self) -> str:
        return digest("python", 1, self.heldout, [file.hash for file in self.files])

    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def limited(self, limit_bytes: int) -> PythonCorpus:
        limit = limit_bytes if self.limit_bytes is None else min(limit_bytes, self.limit_bytes)
        return PythonCorpus(stdlib_only=self._stdlib_only, limit_bytes=limit, heldout=self.heldout)


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    return _python_files("stdlib", root, _SKIPPED_DIRECTORIES | _SKIPPED_IN_STDLIB)


def _package_files() -> Iterator[tuple[str, Path]]:
    roots = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for root in dict.fromkeys(Path(root).resolve() for root in roots):
        yield from _python_files("packages", root, _SKIPPED_DIRECTORIES)


def _python_files(label: str, root: Path, skipped: set[str]) -> Iterator[tuple[str, Path]]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in skipped and not name.startswith((".", *_SKIPPED_PREFIXES))
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                path = Path(directory, name)
                yield f"{label}/{path.relative_to(root).as_posix()}", path


def _read(path: Path) -> str | None:
    """The text of a file, or None if it is unreadable, not UTF-8, or of no sensible size."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text if MIN_FILE_BYTES <= len(content) <= MAX_FILE_BYTES else None
