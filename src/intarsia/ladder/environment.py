"""The machine and the versions, for the record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from intarsia import __version__


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    found = {"intarsia": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(**more: Any) -> dict[str, Any]:
    """Versions, machine and date, with whatever else the comparison wants to keep."""
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        memory = "unknown"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        **versions(),
        "system": platform.platform(),
        "processor": processor(),
        "memory": memory,
        **more,
    }
