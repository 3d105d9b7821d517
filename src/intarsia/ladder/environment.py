"""The machine and the versions, for the record."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.model.fingerprint import Fingerprint


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(fingerprints: Mapping[str, Fingerprint], **more: Any) -> dict[str, Any]:
    """Versions, machine and date, with whatever else the comparison wants to keep.

    Args:
        fingerprints: of each arm. The `spec.json` of a run holds its own in full; here is one hash of each arm's code.
    """
    found = list(fingerprints.values())
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        memory = "unknown"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        **{name: version for one in found for name, version in one.versions.items()},
        "commit": {name: commit for one in found for name, commit in one.commits.items()},
        "arithmetic": {name: value for one in found for name, value in one.arithmetic.items()},
        "code": {arm: one.code_hash for arm, one in fingerprints.items()},
        "system": platform.platform(),
        "processor": processor(),
        "memory": memory,
        **more,
    }
