"""A child that needs several processes: it is the first of them, and starts the others, as torchrun would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from intarsia.jobs.child import CRASHED, DONE, FAILED, INTERRUPTED, PARENT
from intarsia.jobs.pool import describe_exit

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which processes find one another."""
SECONDS_TO_END = 30.0
"""For the others, when the first has done its work; and for the first, when one of the others has been lost."""


def my_rank() -> int:
    """Which of them this process is: 0 for the first, or for one that is alone."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def together(processes: int, module: str, argument: Path) -> Iterator[None]:
    """Be the first of so many processes of this machine; the others run `python -m MODULE ARGUMENT` and find their
    rank in the environment. For one that is alone, and in the others, nothing happens.

    They end with this process, however it ends. Should one of them be lost, this one ends too: what they do together
    would wait for ever.
    """
    if processes == 1 or my_rank():
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in NAMES}
    others = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(argument)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # this process's log: what goes to the parent is its own
            env={
                **os.environ,
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                PARENT: str(os.getpid()),
            },
        )
        for rank in range(1, processes)
    ]
    over = threading.Event()
    for rank, other in enumerate(others, start=1):
        threading.Thread(target=_watch, args=(rank, other, over), daemon=True).start()
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    try:
        yield
    finally:
        over.set()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _end(others)


def _watch(rank: int, process: subprocess.Popen[bytes], over: threading.Event) -> None:
    status = process.wait()
    if status in (DONE, FAILED, INTERRUPTED):
        return  # the first comes there, too
    if not over.wait(SECONDS_TO_END):
        print(f"process {rank} {describe_exit(status)}: the others end, too", file=sys.stderr, flush=True)
        os._exit(CRASHED)


def _end(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for other in others:
        try:
            other.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            other.send_signal(signal.SIGKILL)
            other.wait()
