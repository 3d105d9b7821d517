"""Locks between processes, on a file. A lock goes with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from intarsia.errors import UnsupportedError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_SECONDS_BETWEEN_TRIES = 0.1


@contextmanager
def locked(
    path: Path, busy: Exception | None = None, *, seconds: float = 0.0, optional: bool = False
) -> Iterator[bool]:
    """Keep other processes out while this lasts.

    Args:
        path: the file that is locked; made, with its directory, if it is not there, and left there.
        busy: what is raised where another process holds the lock.
        seconds: how long to wait for it; `math.inf` for as long as it takes.
        optional: go on without a lock where the system or the file system has none.

    Yields:
        Whether the lock is held: False where there is none to be had.

    Raises:
        UnsupportedError: there are no locks here, and they are not `optional`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            taken = _take(file, seconds)
        except UnsupportedError as error:
            if not optional:
                raise UnsupportedError(f"{path.parent} cannot be locked: {error}") from error
            yield False
            return
        if not taken:
            raise busy or BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
        yield True


def _take(file: BinaryIO, seconds: float) -> bool:
    """Take the lock; False if another process held it all the time."""
    try:
        import fcntl
    except ImportError:
        raise UnsupportedError("this system has no locks on files") from None

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if seconds == math.inf else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UnsupportedError(f"its file system has no locks ({error.strerror})") from error
        time.sleep(_SECONDS_BETWEEN_TRIES)
