"""Runs on the machines of a Ray cluster: what `Pool` does with children of this process, on other machines.

Each run is a Ray task that starts the same child process there and hands on what it says. All machines need this
package, and the directory on a file system that they share. A run whose machine or worker is lost is started again
elsewhere: the lock in its directory keeps it from being made twice at a time, its last checkpoint keeps it from
beginning anew, and one that was finished before it could say so is found finished.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.errors import ConfigError
from intarsia.extras import require
from intarsia.jobs.child import CRASHED, INTERRUPTED
from intarsia.jobs.machine import cores
from intarsia.jobs.pool import Event, Events, Pool, next_event

ATTEMPTS = 3
"""How often a run is started whose machine is lost again and again."""
SECONDS_TO_ANSWER = 10.0
"""For a cluster's head."""
STOP = ".stop"
"""The file in a run's directory that asks it to save and end: Ray's own way tells nobody when that is done."""
OURS = "INTARSIA_"
"""Environment variables that begin so go with a run to its machine."""


@dataclass(frozen=True)
class RayCluster:
    """The machines of a cluster that this process is connected to."""

    nodes: tuple[Mapping[str, float], ...]
    """What each machine that lives has: `CPU`, `memory` in bytes, `GPU`."""
    on_gpus: bool
    """Whether each run takes a GPU."""

    @property
    def cores(self) -> int:
        """All together."""
        return sum(int(node.get("CPU", 0)) for node in self.nodes)

    @property
    def widest(self) -> int:
        """CPUs of the machine that has most."""
        return max((int(node.get("CPU", 0)) for node in self.nodes), default=0)

    def jobs(self, runs: int, bytes_of_run: int) -> int:
        """How many of so many runs fit at a time, each with so much memory; one on each GPU."""
        if self.on_gpus:
            return min(runs, sum(int(node.get("GPU", 0)) for node in self.nodes))
        fit = [
            min(int(node.get("CPU", 0)), int(node.get("memory", 0) // bytes_of_run)) for node in self.nodes
        ]
        return min(runs, sum(fit))

    def workers(self) -> RayPool:
        """What makes runs there."""
        return RayPool(self.on_gpus)


@contextmanager
def ray_cluster(address: str) -> Iterator[RayCluster]:
    """Be connected to a Ray cluster. A connection that this process has already is used, and stays.

    Args:
        address: `HOST:PORT`, `auto` for the cluster that this machine is part of, or `local` for one that is started on
            this machine's cores and ends with the context.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: no cluster answers there, or none of its machines can make a run.
    """
    ray = require("ray", "ray")
    begun = not ray.is_initialized()
    if begun:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        options = {"num_cpus": cores(), "include_dashboard": False} if address == "local" else {}
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:  # Ray raises bare ones, too: for a node that does not start in its time
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"no Ray cluster answers at {address!r}: {reason}; start one with `ray start --head`, name its "
                "HOST:PORT, or use `local`, which needs none"
            ) from None
    try:
        yield _look_at(ray, address)
    finally:
        if begun:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError or ValueError where nobody listens: Ray itself waits for minutes and then ends the process."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise ValueError("an address is HOST:PORT, `auto` or `local`")
    socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()


def _look_at(ray: Any, address: str) -> RayCluster:
    import torch

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    on_gpus = torch.cuda.is_available()
    what = "GPU" if on_gpus else "CPU"
    if not any(node.get(what, 0) >= 1 for node in nodes):
        here = " as this machine has, on which the runs would be computed otherwise" if on_gpus else ""
        raise ConfigError(f"no machine of the Ray cluster at {address!r} has a {what}{here}")
    return RayCluster(nodes, on_gpus)


@dataclass
class RayPool:
    """Makes runs on a cluster, hands on what they say, and stops them all. The face of `Pool`."""

    on_gpus: bool = False
    grace: float = 60.0
    """Seconds that runs have to save their checkpoints when they are asked to stop."""
    running: dict[str, tuple[Any, Path]] = field(default_factory=dict)
    """The task of each run, and its directory."""
    _events: Events = field(default_factory=queue.SimpleQueue)
    _stopping: bool = False

    @property
    def busy(self) -> bool:
        """Whether any run is left."""
        return bool(self.running)

    def start(self, key: str, module: str, argument: Path, log: Path, threads: int) -> None:
        """Have `python -m MODULE ARGUMENT` run on some machine that has so many CPUs free. What it prints is appended
        to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        (argument / STOP).unlink(missing_ok=True)
        ours = {name: value for name, value in os.environ.items() if name.startswith(OURS)}
        call = (module, str(argument.resolve()), str(log.resolve()), threads, ours, self.grace)
        self.running[key] = self._submit(*call), argument
        threading.Thread(target=self._follow, args=(key, log, call), daemon=True).start()

    def _submit(self, *call: Any) -> Any:
        import ray

        # Lost tasks are given again by `_follow`, which tells of it.
        task = ray.remote(_make).options(
            num_cpus=call[3], num_gpus=int(self.on_gpus), max_retries=0, num_returns="streaming"
        )
        return task.remote(*call)

    def _follow(self, key: str, log: Path, call: tuple[Any, ...]) -> None:
        """Hand on what a run says, and give it again while its machine is lost."""
        for attempt in range(1, ATTEMPTS + 1):
            ended, why = self._listen(key, log)
            if ended is not None:
                self._events.put((key, ended))
                return
            lost = f"its machine or its worker was lost ({why})"
            _append(log, f"attempt {attempt}: {lost}")
            if self._stopping:
                self._events.put((key, INTERRUPTED))
                return
            if attempt < ATTEMPTS:
                self._events.put((key, {"event": "lost", "why": lost}))
                self.running[key] = self._submit(*call), self.running[key][1]
        self._events.put((key, CRASHED))

    def _listen(self, key: str, log: Path) -> tuple[int | None, str]:
        """The exit status of a run; None, and why, if the run was lost."""
        import ray

        try:
            for told in self.running[key][0]:
                event = ray.get(told)
                if event == INTERRUPTED and not self._stopping:
                    return None, "it was stopped from outside"
                if isinstance(event, int):
                    return event, ""
                self._events.put((key, event))
        except ray.exceptions.TaskCancelledError:
            return INTERRUPTED, ""
        except ray.exceptions.RayTaskError as error:  # what was raised there, and would be again
            _append(log, str(error))
            return CRASHED, ""
        except ray.exceptions.RayError as error:
            return None, type(error).__name__
        return None, "it ended without a word"

    def wait(self, seconds: float) -> tuple[str, Event | int] | None:
        """The next event: what a run said, or its exit status; None if nothing happens in time."""
        return next_event(self._events, self.running, seconds)

    def stop(self) -> None:
        """Ask every run to save and end; end those that have not after the time of grace. A second Ctrl-C ends them at
        once."""
        import ray

        self._stopping = True
        places = [argument for _, argument in self.running.values() if argument.is_dir()]
        deadline = time.monotonic() + 2 * self.grace  # as long as the machines give them, and to hear of it
        try:
            for place in places:
                (place / STOP).touch()
            while self.running and time.monotonic() < deadline:
                self.wait(0.2)
        except KeyboardInterrupt:
            pass
        finally:
            for task, _ in list(self.running.values()):
                ray.cancel(task, force=True)
            self.running.clear()
            for place in places:
                (place / STOP).unlink(missing_ok=True)


def _make(
    module: str, argument: str, log: str, threads: int, environment: Mapping[str, str], grace: float
) -> Iterator[Event | int]:
    """On the machine that makes a run: what the child process says, and last its exit status."""
    if not Path(argument).is_dir():
        raise FileNotFoundError(
            f"{argument} is not there on {socket.gethostname()}: the machines of a Ray cluster need the directory of "
            "the results on a file system that they share"
        )
    pool, asked = Pool(grace=grace, environment=environment), Path(argument) / STOP
    pool.start("run", module, Path(argument), Path(log), threads)
    try:
        while not asked.exists():
            if happened := pool.wait(0.25):
                yield happened[1]
                if not pool.busy:
                    return
    finally:
        pool.stop()
    yield INTERRUPTED


def _append(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
