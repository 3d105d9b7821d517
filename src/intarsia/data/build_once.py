"""What is made once and kept in a directory: whoever needs it next finds it there."""

from __future__ import annotations

import errno
import glob
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from intarsia.errors import DataError
from intarsia.files import directory_atomically
from intarsia.jobs.locks import locked


def build_once(target: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool]) -> None:
    """Make the directory `target` by `build`, unless it is there and complete.

    `build` fills a directory beside the target, which takes the target's name when all is on the disk. A
    crash at any moment leaves the target absent, and a remainder that the next call removes. Of several
    processes that want the same target one builds it, and the others wait and find it.

    Raises:
        DataError: the disk is full, or the place cannot be written to.
    """
    if is_complete(target):
        return
    lock = target.with_name(f".{target.name}.lock")
    with _clear_errors(target), locked(lock, seconds=math.inf, optional=True) as alone:
        if is_complete(target):
            return
        if alone:
            for remainder in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
                shutil.rmtree(remainder, ignore_errors=True)
        with directory_atomically(target, unless=is_complete) as partial:
            build(partial)


def slug(name: str) -> str:
    """A short form of a name that can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-40:] or "corpus"


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
