"""Runs on a Ray cluster: told clearly where there is none, and made on machines of which one is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import ConfigError, MissingExtraError
from intarsia.jobs.ray_cluster import ATTEMPTS, RayCluster, ray_cluster

GIB = 2**30


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'intarsia\[ray\]'"), ray_cluster("local"):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:9",
            r"no Ray cluster answers at '127.0.0.1:9': .*refused; start one with `ray start --head`",
        ),
        ("somewhere", r"an address is HOST:PORT, `auto` or `local`"),
    ],
)
def test_a_cluster_that_is_not_there(address: str, message: str) -> None:
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match=message), ray_cluster(address):
        pass


def test_a_cluster_that_does_not_start_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ConfigError, match=r"no Ray cluster answers at 'local': The current node timed out"),
        ray_cluster("local"),
    ):
        pass


def test_as_many_runs_as_each_machine_has_room_for() -> None:
    machines = RayCluster(
        ({"CPU": 4.0, "memory": 8.0 * GIB}, {"CPU": 2.0, "memory": 64.0 * GIB}, {"memory": 9.0 * GIB}), False
    )
    assert (machines.cores, machines.widest) == (6, 4)
    assert machines.jobs(100, GIB) == 6
    assert machines.jobs(5, GIB) == 5
    assert machines.jobs(100, 4 * GIB) == 4, "two, as the first one's memory allows, and both of the second"
    on_gpus = RayCluster(({"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0}), True)
    assert on_gpus.jobs(100, GIB) == 8


CHILD = """
import os, sys, time
from pathlib import Path
from intarsia.jobs.child import DONE, INTERRUPTED, child_process
from intarsia.jobs.signals import StopRequest

place = Path(sys.argv[1])
with child_process(place / ".lock") as channel:
    before = int(place.joinpath("begun").read_text() or 0) if place.joinpath("begun").exists() else 0
    place.joinpath("begun").write_text(str(before + 1))
    place.joinpath("worker").write_text(str(os.getppid()))
    channel.begin("work", 3, before)
    what = place.joinpath("what").read_text()
    if what == "ends" or (what == "waits once" and before):
        channel.send(event="said", threads=os.environ["OMP_NUM_THREADS"], told=os.environ.get("INTARSIA_TOLD"))
        sys.exit(DONE)
    with StopRequest(lambda text: None) as stop:
        channel.send(event="ready")
        while not stop.requested:
            time.sleep(0.01)
    place.joinpath("saved").write_text("")
sys.exit(INTERRUPTED)
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster of this machine's own, of two CPUs, that knows the module of the runs."""
    ray = pytest.importorskip("ray")
    place = tmp_path_factory.mktemp("modules")
    (place / "ray_child.py").write_text(CHILD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        try:
            with ray_cluster("ignored: this process is connected") as found:
                yield found
            assert ray.is_initialized(), "whoever connected may go on"
        finally:
            ray.shutdown()


def begin(pool: Any, place: Path, what: str) -> Path:
    place.mkdir()
    (place / "what").write_text(what)
    pool.start(what, "ray_child", place, place / "log.txt", 1)
    return place


def until(pool: Any, kind: str | None) -> list[Any]:
    """What is said up to the first event of that kind, or up to an exit status."""
    said: list[Any] = []
    deadline = time.monotonic() + 120
    while not said or not (
        isinstance(said[-1], int) if kind is None else dict(said[-1]).get("event") == kind
    ):
        assert time.monotonic() < deadline, said
        if happened := pool.wait(0.1):
            said.append(happened[1])
    return said


slow = pytest.mark.slow


@slow
def test_what_a_run_says_arrives(
    machines: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (machines.cores, machines.widest) == (2, 2)
    monkeypatch.setenv("INTARSIA_TOLD", "yes")
    pool = machines.workers()
    begin(pool, tmp_path / "run", "ends")
    begun, said, status = until(pool, None)
    assert (begun["event"], said["threads"], said["told"], status) == ("begin", "1", "yes", 0)
    assert not pool.busy


@slow
def test_a_run_whose_worker_is_killed_is_made_again(machines: RayCluster, tmp_path: Path) -> None:
    pool = machines.workers()
    place = begin(pool, tmp_path / "run", "waits once")
    until(pool, "ready")
    os.kill(int((place / "worker").read_text()), signal.SIGKILL)
    lost, begun, _, status = until(pool, None)
    assert "was lost" in lost["why"]
    assert (begun["done"], status) == (1, 0), "it went on where it was"
    assert (place / "saved").exists(), "the child of the lost worker has ended, and has saved before"
    assert "attempt 1: its machine or its worker was lost" in (place / "log.txt").read_text()


@slow
def test_one_that_is_lost_again_and_again_fails(machines: RayCluster, tmp_path: Path) -> None:
    pool = machines.workers()
    place = begin(pool, tmp_path / "run", "waits")
    for _ in range(ATTEMPTS):
        until(pool, "ready")
        os.kill(int((place / "worker").read_text()), signal.SIGKILL)
    assert until(pool, None)[-1] == 1
    assert (place / "begun").read_text() == str(ATTEMPTS)
    assert f"attempt {ATTEMPTS}: " in (place / "log.txt").read_text()


@slow
def test_runs_are_asked_to_save_and_end(machines: RayCluster, tmp_path: Path) -> None:
    pool = machines.workers()
    place = begin(pool, tmp_path / "run", "waits")
    until(pool, "ready")
    pool.stop()
    assert not pool.busy
    assert (place / "saved").exists()


@slow
def test_a_directory_that_is_not_there_is_told(machines: RayCluster, tmp_path: Path) -> None:
    pool = machines.workers()
    (tmp_path / "logs").mkdir()
    pool.start("nowhere", "ray_child", tmp_path / "nowhere", tmp_path / "logs" / "log.txt", 1)
    assert until(pool, None) == [1]
    assert "on a file system that they share" in (tmp_path / "logs" / "log.txt").read_text()
