"""Directories that are either wholly there or not there at all."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from intarsia.errors import DataError
from intarsia.files import flush


def build_directory(target: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool]) -> None:
    """Make the directory `target` by `build`, unless it is there and complete.

    `build` fills a directory beside the target, which takes the target's name when all is on the disk. A
    crash at any moment leaves the target absent, and a remainder that the next call removes. Of several
    processes that want the same target one builds it, and the others wait and find it.

    Raises:
        DataError: the disk is full, or the place cannot be written to.
    """
    if is_complete(target):
        return
    with _clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{target.name}.lock")) as alone:
            if is_complete(target):
                return
            if alone:
                for remainder in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
                    shutil.rmtree(remainder, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            try:
                # mkdtemp makes private directories; give this one the permissions that mkdir would have
                # given.
                umask = os.umask(0)
                os.umask(umask)
                partial.chmod(0o777 & ~umask)
                build(partial)
                _flush_all(partial)
                _rename(partial, target, is_complete)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def slug(name: str) -> str:
    """A short form of a name that can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-40:] or "corpus"


def _rename(partial: Path, target: Path, is_complete: Callable[[Path], bool]) -> None:
    if target.exists() and not is_complete(target):
        # Damaged from outside. Readers that have its files open keep them.
        shutil.rmtree(target)
    try:
        partial.rename(target)
    except OSError:
        if not is_complete(target):  # else another process, on a file system without locks, was faster
            raise
    flush(target.parent)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock that dies with the process. Gives False where the system or the file system has none."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            yield False
        else:
            yield True


def _flush_all(directory: Path) -> None:
    """Have the disk hold every file before the name says that they are complete."""
    for path in directory.rglob("*"):
        flush(path)
    flush(directory)


@contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = target.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space, or choose another directory"
            raise DataError(
                f"the disk is full ({error.strerror}) while writing to {place}: {advice}"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(
                f"cannot write to {place} ({error.strerror}): choose another directory"
            ) from error
        raise DataError(f"writing to {place} failed: {error}") from error
