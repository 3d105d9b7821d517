"""Children: what they say arrives, they do not outlive their parent, and they are stopped politely, then not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from intarsia.jobs.child import DONE, INTERRUPTED
from intarsia.jobs.pool import Pool, describe_exit

CHILD = """
import os, signal, sys, time
from pathlib import Path
from intarsia.jobs.child import DONE, INTERRUPTED, child_process
from intarsia.jobs.signals import StopRequest

place = Path(sys.argv[1])
what = place.joinpath("what").read_text()
with child_process(place / ".lock") as channel:
    print("for the log")
    channel.begin("work", 3)
    channel.advance(1, {"loss": 2.0, "tokens/s": 10.0})
    channel.send(event="threads", threads=os.environ["OMP_NUM_THREADS"], rank=os.environ.get("RANK"))
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel.send(event="ready")
        time.sleep(60)
    if what == "polite":
        with StopRequest(lambda text: None) as stop:
            channel.send(event="ready")
            while not stop.requested:
                time.sleep(0.01)
            place.joinpath("saved").write_text("")
        sys.exit(INTERRUPTED)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
sys.exit(DONE)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that a child runs."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "some_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    return "some_child"


def start(pool: Pool, module: str, directory: Path, what: str) -> Path:
    directory.mkdir()
    (directory / "what").write_text(what)
    pool.start(what, module, directory, directory / "log.txt", threads=3)
    return directory


def until(pool: Pool, done: Any) -> list[Any]:
    """The events up to the first of which `done` holds."""
    events: list[Any] = []
    deadline = time.monotonic() + 60
    while not events or not done(events[-1]):
        assert time.monotonic() < deadline
        if (happened := pool.wait(0.1)) is not None:
            events.append(happened[1])
    return events


def test_what_a_child_says_and_how_it_ends(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    pool = Pool()
    place = start(pool, module, tmp_path / "a", "ends")
    events = until(pool, lambda event: isinstance(event, int))
    assert events == [
        {"event": "begin", "total": 3, "done": 0},
        {"event": "step", "done": 1, "loss": 2.0, "speed": 10.0},
        {"event": "threads", "threads": "3", "rank": None},
        DONE,
    ]
    assert (place / "log.txt").read_text() == "for the log\n"
    assert not pool.children


def test_a_child_that_dies_is_told(tmp_path: Path, module: str) -> None:
    pool = Pool()
    start(pool, module, tmp_path / "a", "dies")
    status = until(pool, lambda event: isinstance(event, int))[-1]
    assert "signal 9 (SIGKILL)" in describe_exit(status)


def test_stopping_asks_and_then_kills(tmp_path: Path, module: str) -> None:
    pool = Pool(grace=2.0)
    polite = start(pool, module, tmp_path / "a", "polite")
    start(pool, module, tmp_path / "b", "stubborn")
    processes = [child.process for child in pool.children.values()]
    ready: list[Any] = []
    while len(ready) < 2:
        ready += [
            event for event in until(pool, lambda e: e == {"event": "ready"}) if event == {"event": "ready"}
        ]
    pool.stop()
    assert (polite / "saved").exists()
    assert [process.returncode for process in processes] == [INTERRUPTED, -signal.SIGKILL]
    assert not pool.children


def test_children_die_with_their_parent(tmp_path: Path, module: str) -> None:
    code = (
        "import sys, time; from pathlib import Path; from intarsia.jobs.pool import Pool\n"
        "place = Path(sys.argv[1]); pool = Pool(); pool.start('a', 'some_child', place, place / 'log.txt', 1)\n"
        "while True:\n"
        "    happened = pool.wait(1)\n"
        "    if happened and happened[1] == {'event': 'ready'}: print('ready', flush=True)\n"
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "what").write_text("polite")
    arguments = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    deadline = time.monotonic() + 30
    while not (tmp_path / "a" / "saved").exists():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
