"""The numbers of a run: one JSON object a line, and TensorBoard events if asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from intarsia.errors import CheckpointError
from intarsia.extras import require
from intarsia.files import naming, write_text

TIMINGS = ("seconds", "tokens_per_second")
"""The fields of a line that depend on the machine's mood. All others are the same when a run is repeated."""


@dataclass(frozen=True)
class Lines:
    """How many lines there are, and the hash of them all: what a checkpoint knows of the metrics before it."""

    count: int = 0
    sha256: str = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that was cut off in the middle is left out.

    Raises:
        CheckpointError: another line cannot be read.
    """
    lines, damaged = _read(path)
    if damaged is not None and damaged <= len(lines):
        raise CheckpointError(f"{path} is damaged: its line {damaged} cannot be read")
    return lines


def _read(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The lines that can be read, and the number (from 1) of the first that cannot."""
    lines: list[dict[str, Any]] = []
    damaged = None
    content = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append({"kind": line["kind"], "step": int(line["step"]), **line})
        except (ValueError, TypeError, KeyError):
            damaged = damaged or number
    return lines, damaged


def lines_up_to(path: Path, step: int) -> str:
    """The text of the lines of a file up to a step, as far as they can be read."""
    return "".join(_encode(line) for line in _read(path)[0] if line["step"] <= step)


class Metrics:
    """Appends to `metrics.jsonl`. Opened at the step that a run goes on from: later lines are removed first,
    since the steps that they tell of are done again. Without a path nothing is written.

    `known` is what the checkpoint of that step knows of the lines before it. If some were lost or changed since, `gap`
    says so, and a line of the kind `gap` marks the place.
    """

    def __init__(
        self, path: Path | None, step: int, tensorboard: Path | None = None, known: Lines | None = None
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self.gap: str | None = None
        self._path, self._digest = path, hashlib.sha256()
        self._file: TextIO | None = None
        if path is not None:
            self.lines = [line for line in _read(path)[0] if line["step"] <= step]
            self._look_for_a_gap(path, step, known)
            write_text(path, "".join(_encode(line) for line in self.lines))
            self._file = path.open("a")
            self._digest.update(path.read_bytes())
        self._events: Any = None
        if tensorboard is not None:
            writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self._events = writer(str(tensorboard), purge_step=step + 1)

    def _look_for_a_gap(self, path: Path, step: int, known: Lines | None) -> None:
        # Lines behind those that the checkpoint knows are right: an evaluation can come after it.
        if known is None or _summary(self.lines[: known.count]) == known or self.has("gap", step):
            return
        found = len(self.lines)
        what = (
            f"{known.count - found} of the {known.count} lines up to step {step} are missing"
            if found < known.count
            else f"the lines up to step {step} are not those that were written"
        )
        self.gap = f"{path} is damaged: {what}. The run goes on; a line of the kind 'gap' marks the place."
        self.lines.append({"kind": "gap", "step": step, "lines": known.count, "found": found})

    @property
    def known(self) -> Lines:
        """What a checkpoint is to know of the lines so far."""
        return Lines(len(self.lines), self._digest.hexdigest() if self.lines else "")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()
        except OSError:
            if kind is None:  # or what went wrong before would be forgotten
                raise

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, which keeps it if this process is killed."""
        line = {"kind": kind, "step": step, **values}
        self.lines.append(line)
        if self._file is not None and self._path is not None:
            text = _encode(line)
            self._digest.update(text.encode())
            with naming(self._path):
                self._file.write(text)
                self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Make sure that all lines are on the disk."""
        if self._file is not None and self._path is not None:
            with naming(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a line of this kind for this step."""
        return any(line["kind"] == kind and line["step"] == step for line in self.lines)


def _summary(lines: Sequence[dict[str, Any]]) -> Lines:
    text = "".join(map(_encode, lines)).encode()
    return Lines(len(lines), hashlib.sha256(text).hexdigest() if lines else "")


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
