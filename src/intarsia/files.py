"""Files and directories that are either wholly there or not there at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` only when the block ends without an error.

    The file is written beside its target, flushed to the disk and renamed over it, so that a reader (or a
    crash at any moment) sees the old content or the new one and never half of it.
    """
    target = Path(path)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, _public(0o666))
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with write_atomically(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, default=default) + "\n")


@contextmanager
def directory_atomically(
    path: str | os.PathLike[str], unless: Callable[[Path], bool] = lambda found: False
) -> Iterator[Path]:
    """Fill a directory that takes the name `path` only when the block ends without an error.

    It is filled beside its target under a hidden name (`.NAME.partial-...`), which a crash leaves behind. What was
    there before is replaced as a whole (`publish_directory`), unless `unless` holds of it when the block ends: then
    another process was faster, and what is new is given up.

    Raises:
        NotADirectoryError: a file has that name.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR,
            "this is a file, and a directory is to be written: choose another name",
            os.fspath(target),
        )
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            partial.chmod(_public(0o777))
            yield partial
            if not unless(target):
                publish_directory(partial, target)
        finally:
            # After an exchange this is what was there before. Readers that have its files open keep them.
            shutil.rmtree(partial, ignore_errors=True)


def publish_directory(partial: Path, target: Path) -> None:
    """Bring a filled directory to the disk and give it its final name, beside the one it has.

    A directory that has the name changes places with it, in one step where the system can do that (Linux, on most file
    systems); elsewhere the name is gone for the moment between two renamings.

    Raises:
        OSError: it cannot be renamed; or what is to be replaced is the current directory, or holds it.
    """
    for path in partial.rglob("*"):
        flush(path)
    flush(partial)
    if not target.exists():
        partial.rename(target)
    elif Path.cwd().is_relative_to(target):
        advice = "this is the current directory, which cannot be replaced: choose a directory in it"
        raise OSError(errno.EBUSY, advice, os.fspath(target))
    elif not _exchange(partial, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.before-", dir=target.parent))
        target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(partial)
    flush(target.parent)


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file that is never changed another name; copy it where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD: paths as they are; RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def _public(mode: int) -> int:
    """The permissions that `mode` comes to here. What tempfile makes is private; the result need not be."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def flush(path: str | os.PathLike[str]) -> None:
    """Bring a file's content, or the names in a directory, to the disk."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError of the block name `path`, if it names no file: a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that nothing more could be written to a disk."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        waiting += [one.__cause__, one.__context__]
    return False


def message_of(error: BaseException) -> str:
    """What to tell the user of an error."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        if is_disk_full(error):
            return f"{where}the disk is full. Make room there, then give the same command again."
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hex digits; read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
