"""The numbers of a run: one JSON object a line, and TensorBoard events if asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from intarsia.extras import require
from intarsia.files import write_text

TIMINGS = ("seconds", "tokens_per_second")
"""The fields of a line that depend on the machine's mood. All others are the same when a run is repeated."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that was cut off in the middle is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Metrics:
    """Appends to `metrics.jsonl`. Opened at the step that a run goes on from: later lines are removed first,
    since the steps that they tell of are done again. Without a path nothing is written."""

    def __init__(self, path: Path | None, step: int, tensorboard: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if path is not None:
            self.lines = [line for line in read_metrics(path) if line["step"] <= step]
            write_text(path, "".join(_encode(line) for line in self.lines))
            self._file = path.open("a")
        self._events: Any = None
        if tensorboard is not None:
            writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self._events = writer(str(tensorboard), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, which keeps it if this process is killed."""
        line = {"kind": kind, "step": step, **values}
        self.lines.append(line)
        if self._file is not None:
            self._file.write(_encode(line))
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Make sure that all lines are on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a line of this kind for this step."""
        return any(line["kind"] == kind and line["step"] == step for line in self.lines)


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
