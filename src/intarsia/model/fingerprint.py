"""What decides a run's numbers beside its configuration: the code, the libraries, the arithmetic of the machine.

Two runs of one configuration give the same numbers, to the bit, where their fingerprints agree in `decisive`. A run
that is found on the disk with another one was made by something else: `changes` says by what.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import intarsia
from intarsia.mixers.plugins import plugin_mixers
from intarsia.model.config import ModelConfig
from intarsia.ops.arithmetic import arithmetic
from intarsia.sources import digest, find_source, sources_of

LIBRARIES = ("torch", "numpy", "tokenizers")
"""Of whose versions Intarsia's numbers depend."""
DECISIVE = ("versions", "arithmetic", "code")
"""The parts of a fingerprint that decide numbers."""
_NUMBERLESS = (
    "intarsia.mixers.registry",
    "intarsia.mixers.plugins",
    "intarsia.model.presets",  # names many mixers that are not used; so does the next
    "intarsia.model.published",
    "intarsia.errors",
    "intarsia.extras",
    "intarsia.files",
    "intarsia.settings",
    "intarsia.settings.bounds",
    "intarsia.settings.reading",
    "intarsia.settings.tables",
    "intarsia.settings.toml",
    "intarsia.jobs.locks",
    "intarsia.jobs.progress",
    "intarsia.jobs.signals",
)
"""Modules that decide no numbers."""


@dataclass(frozen=True)
class Fingerprint:
    """The code and the machine behind a run.

    `versions`: of Python, Intarsia and the libraries, also those that foreign mixers import.
    `arithmetic`: what computes: the kernels with their instruction set, PyTorch's instruction set; or the GPU.
    `code`: a hash for each module whose code takes part: the mixers of the layout and what they import, the model, the
    training, and the parts of Intarsia that those use. Other mixers do not count, nor do comments and docstrings.
    `commits`: of the packages that are git checkouts. For the record: a commit may change what takes no part here.
    `files`: where the modules of plugins are. For the record, too: elsewhere they are the same code.
    """

    versions: Mapping[str, str]
    arithmetic: Mapping[str, str]
    code: Mapping[str, str]
    commits: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def decisive(self) -> dict[str, dict[str, str]]:
        """What decides numbers, as JSON-able values."""
        return {part: dict(getattr(self, part)) for part in DECISIVE}

    @property
    def code_hash(self) -> str:
        """One hash of all code."""
        listed = "\n".join(f"{name} {value}" for name, value in sorted(self.code.items()))
        return digest(listed.encode())

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as JSON-able values; `changes` takes two of them."""
        return asdict(self)


def fingerprint(
    config: ModelConfig,
    device: torch.device | str = "cpu",
    *,
    modules: Iterable[str] = ("intarsia.training.start_or_resume",),
) -> Fingerprint:
    """The fingerprint of training this model here and now.

    Args:
        device: where it is trained.
        modules: whose code takes part, beside the model's and its mixers'. They are read and not imported.

    Raises:
        ConfigError: INTARSIA_CPU_ISA names an instruction set that is not there, or a module cannot be found.
    """
    mixers = {type(config.mixers[name]) for name in config.layers}
    found = sources_of(
        ["intarsia.model.language_model", *modules],
        sorted(mixers, key=lambda mixer: (mixer.__module__, mixer.__qualname__)),
        ignored=_NUMBERLESS,
    )
    foreign = {name.partition(".")[0] for name in found.hashes} - {"intarsia"}
    return Fingerprint(
        versions=versions(found.libraries if foreign else ()),
        arithmetic=arithmetic(device),
        code=dict(sorted(found.hashes.items())),
        commits=commits(["intarsia", *sorted(foreign)]),
        files={mixer.__module__: str(find_source(mixer.__module__)) for mixer in mixers & {*plugin_mixers()}},
    )


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """The versions of Intarsia, Python and the libraries; `more` are names of other modules that are imported."""
    known = {"intarsia": intarsia.__version__, "python": platform.python_version()}
    for package in LIBRARIES:
        if (version := _version(package)) is not None:
            known[package] = version
    others = set(more) - {"intarsia", *LIBRARIES}
    packages = importlib.metadata.packages_distributions() if others else {}
    for module in sorted(others):
        for package in packages.get(module, ()):
            if (version := _version(package)) is not None:
                known[package] = version
    return known


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commits(packages: Iterable[str]) -> dict[str, str]:
    """The commit of each package (or module) that git keeps, with ` and changes` behind it where its files were changed
    since."""
    paths = {package: find_source(package) for package in packages}
    found = {package: _commit(path) for package, path in paths.items() if path is not None}
    return {package: commit for package, commit in found.items() if commit is not None}


def _commit(path: Path) -> str | None:
    """The commit of a file that git keeps, or of the package whose `__init__.py` it is."""
    # A file that lies in somebody's repository and is not kept there, as in a virtual environment, has no commit.
    if _git(path, "ls-files", "--error-unmatch", path.name) is None:
        return None
    commit = _git(path, "rev-parse", "HEAD")
    content = "." if path.name == "__init__.py" else path.name
    changed = _git(path, "status", "--porcelain", "--", content)
    return f"{commit} and changes" if commit and changed else commit


def _git(path: Path, *arguments: str) -> str | None:
    """What git says in a file's directory, or None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(path.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what decides numbers and differs between two fingerprints (`Fingerprint.to_dict`, as read from JSON);
    nothing where the numbers are the same."""
    lines = []
    for part in ("versions", "arithmetic"):
        old, new = before.get(part) or {}, now.get(part) or {}
        lines += [
            f"{name} was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    old, new = before.get("code") or {}, now.get("code") or {}
    for names, what in (
        ([name for name in old if name in new and old[name] != new[name]], "changed"),
        ([name for name in new if name not in old], "takes part now"),
        ([name for name in old if name not in new], "takes part no more"),
    ):
        if names:
            lines.append(f"the code of {', '.join(sorted(names))} {what}")
    return lines
