"""The machine and the versions, for the record."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from typing import Any

from intarsia.jobs.machine import processor, total_memory
from intarsia.model.fingerprint import Fingerprint


def environment(fingerprints: Mapping[str, Fingerprint], **more: Any) -> dict[str, Any]:
    """Versions, machine and date, with whatever else the comparison wants to keep.

    Args:
        fingerprints: of each arm. The `spec.json` of a run holds its own in full; here is one hash of each arm's code.
    """
    found = list(fingerprints.values())
    memory = total_memory()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        **{name: version for one in found for name, version in one.versions.items()},
        "commit": {name: commit for one in found for name, commit in one.commits.items()},
        "arithmetic": {name: value for one in found for name, value in one.arithmetic.items()},
        "code": {arm: one.code_hash for arm, one in fingerprints.items()},
        "system": platform.platform(),
        "processor": processor(),
        "memory": "unknown" if memory is None else f"{memory / 2**30:.0f} GiB",
        **more,
    }
