"""What the benchmarks share: options, the machine's description, timing in turn, peak memory, tables and results."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from intarsia import __version__
from intarsia.errors import UnsupportedError
from intarsia.files import write_json

Key = TypeVar("Key")


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="where to write the results as JSON")
    return parser


def machine() -> dict[str, Any]:
    """What a reader needs in order to compare with another machine."""
    cpu = platform.processor()
    features = []
    if Path("/proc/cpuinfo").exists():
        lines = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        cpu = lines.get("model name", cpu)
        flags = lines.get("flags", "").split()
        features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu,
        "features": features,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "intarsia": __version__,
    }


def stopwatch(call: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A function that calls `call(*arguments)` and returns the seconds it took."""

    def seconds() -> float:
        begin = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - begin

    return seconds


def cold(timer: Callable[[], float], others: int = 96 << 20) -> Callable[[], float]:
    """A timer before each run of which so many bytes of something else are read, as those of other layers are in
    decoding: what it reads comes from memory and not from the processor's caches."""
    elsewhere = torch.zeros(others // 4)

    def seconds() -> float:
        elsewhere.add_(1)
        return timer()

    return seconds


def in_turn(
    timers: Mapping[Key, Callable[[], float]], seconds: float, turn: float = 0.0, least: int = 3
) -> dict[Key, list[float]]:
    """Let the timers run in turn for `seconds` together, `least` rounds at least, and return what each measured.

    A turn is one run, or as many as fill `turn` seconds: what is quick is measured more often than what is slow.
    """
    times: dict[Key, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, timer in timers.items():
            begin = time.perf_counter()
            times[name].append(timer())
            while time.perf_counter() - begin < turn:
                times[name].append(timer())
        rounds += 1
    return times


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


class Worker:
    """Another program that takes its turns: it prints `ready`, or else why it cannot run, and then answers each
    line on its standard input with the seconds one run took."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it is ready.

        Raises:
            UnsupportedError: it said something else, or nothing.
        """
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        answer = self._read()
        if answer != "ready":
            self.close()
            raise UnsupportedError(answer or f"{command[0]} ended with status {self._process.returncode}")

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def peak_memory(self) -> float:
        """The most memory that it has had resident, MiB."""
        return _field(Path(f"/proc/{self._process.pid}/status"), "VmHWM")

    def close(self) -> None:
        """End its input, which ends it."""
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def available_memory() -> float:
    """What can be allocated without swapping, MiB."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def peak_memory(call: Callable[[], Any]) -> float:
    """The peak of resident memory while `call` runs, above what was resident before, MiB."""
    # The kernel's high-water mark starts afresh when 5 is written here (Linux).
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        before = _field(_STATUS, "VmRSS")
    call()
    peak = (
        _field(_STATUS, "VmHWM")
        if reset.exists()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    return peak - before


_STATUS = Path("/proc/self/status")


def _field(file: Path, field: str) -> float:
    for line in file.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{file} has no {field}")


def table(rows: list[dict[str, Any]], header: bool = True) -> None:
    """Print rows of equal keys as aligned columns."""
    if not rows:
        return
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [
        max(len(key), 10, *map(len, column))
        for key, column in zip(rows[0], zip(*cells, strict=True), strict=True)
    ]
    for line in [list(rows[0])] * header + cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write results as JSON and say where."""
    write_json(path, results)
    print(f"wrote {path}")
