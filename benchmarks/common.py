"""What the benchmarks share: the machine's description, peak memory, tables and results."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from intarsia import __version__
from intarsia.files import write_json


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


def peak_memory(call: Callable[[], Any]) -> float:
    """The peak of resident memory while `call` runs, above what was resident before, MiB."""
    # The kernel's high-water mark starts afresh when 5 is written here (Linux).
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        before = _status("VmRSS")
    call()
    peak = _status("VmHWM") if reset.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def table(rows: list[dict[str, Any]], header: bool = True) -> None:
    """Print rows of equal keys as aligned columns."""
    if not rows:
        return
    widths = {key: max(len(key), 22 if isinstance(rows[0][key], str) else 10) for key in rows[0]}
    if header:
        print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print(
            "  ".join(cell.rjust(width) for cell, width in zip(cells, widths.values(), strict=True)),
            flush=True,
        )


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write results as JSON and say where."""
    write_json(path, results)
    print(f"wrote {path}")
