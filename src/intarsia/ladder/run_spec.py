"""What a training run of a comparison is: everything that decides its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from intarsia.ladder.results import RunRole
from intarsia.model.fingerprint import DECISIVE, changes
from intarsia.tasks import Task, task
from intarsia.tasks.mixed import Mixed
from intarsia.tasks.registry import make_mixed

UNDECISIVE = ("dataset", "device", "branches_from")
"""Fields that do not decide a run's numbers: a place, whose content has a fingerprint; `auto`, of which the fingerprint
says what it was; and the run whose first steps are the same (`intarsia.ladder.branches`)."""


@dataclass(frozen=True)
class TextLesson:
    """A run reads text, and is scored on held-out documents."""

    kind: ClassVar[str] = "text"
    dataset: str
    """The directory of the prepared data; its content counts and not its place."""
    data_fingerprint: str
    documents: tuple[int, ...]
    """The held-out documents that are scored in the end: tuning or judged ones."""
    tokens_per_document: int | None
    bytes_per_token: float
    """Of the training text: brings the training loss to bits per byte, by one factor for all arms."""

    modules: ClassVar[tuple[str, ...]] = ("intarsia.training.start_or_resume",)
    """Whose code makes the numbers."""

    @property
    def name(self) -> str:
        return ""


@dataclass(frozen=True)
class TaskLesson:
    """A run learns a task, and is examined on it."""

    kind: ClassVar[str] = "task"
    name: str
    """Of the exam in the plan."""
    task: str
    options: Mapping[str, Any]
    examples: int
    """Of the validation and of the test."""
    examine_every: int
    turns: Sequence[Mapping[str, Any]] = ()
    """Changes to the options under which the model of a judged run is examined as well."""
    mixture: Sequence[Mapping[str, Any]] = ()
    """Changes to the options that come in turn in what is learned and examined; none: the task as it is."""

    @property
    def made(self) -> Task:
        """What is learned."""
        return make_mixed(self.task, self.options, self.mixture)

    @property
    def modules(self) -> tuple[str, ...]:
        """Whose code makes the numbers."""
        mixed = (Mixed.__module__,) if self.mixture else ()
        return "intarsia.training.task_loop", task(self.task).__module__, *mixed


Lesson = TextLesson | TaskLesson


@dataclass(frozen=True)
class RunSpec:
    """All that decides the numbers of a run."""

    arm: str
    learning_rate: float
    seed: int
    role: RunRole
    model: Mapping[str, Any]
    """`ModelConfig.to_dict()`."""
    train: Mapping[str, Any]
    """`TrainConfig.to_dict()`."""
    lesson: Lesson
    fingerprint: Mapping[str, Any]
    """`Fingerprint.to_dict()`: the code, the libraries and the arithmetic. Its commits decide nothing."""
    threads: int
    """Of each process. It changes rounding, so a comparison keeps to one number."""
    processes: int = 1
    """That train the model together. It changes rounding as threads do."""
    device: str = "auto"
    branches_from: str | None = None
    """A checkpoint `RUN@STEP` of a run that was this one up to there, if there is one: its steps need not be made
    again."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON-able values."""
        values = {name: value for name, value in self.to_dict().items() if name not in UNDECISIVE}
        lesson = {name: value for name, value in values["lesson"].items() if name not in UNDECISIVE}
        fingerprint = {part: self.fingerprint.get(part) for part in DECISIVE}
        return {**values, "lesson": lesson, "fingerprint": fingerprint}

    @property
    def key(self) -> str:
        """Hex digits of everything that decides the numbers."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def subject(self) -> str:
        """Whom the run is of: the arm, or the arm on an exam."""
        return f"{self.lesson.name} {self.arm}".strip()

    @property
    def title(self) -> str:
        return f"{self.subject} lr {self.learning_rate:g} seed {self.seed}"

    @property
    def directory_name(self) -> str:
        return f"{self._directory_prefix}{self.key[:8]}"

    @property
    def _directory_prefix(self) -> str:
        subject = f"{self.lesson.name}-" if self.lesson.name else ""
        return f"{subject}{self.arm}-lr{self.learning_rate:g}-seed{self.seed}-"

    @property
    def steps(self) -> int:
        return int(self.train["steps"])

    @property
    def tokens(self) -> int:
        return int(self.train["steps"] * self.train["rows"] * self.train["length"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; what spec.json holds."""
        return {**asdict(self), "lesson": {"kind": self.lesson.kind, **asdict(self.lesson)}}

    @classmethod
    def load(cls, directory: Path) -> RunSpec:
        """The spec that is in a run's directory."""
        values = json.loads((directory / "spec.json").read_text(encoding="utf-8"))
        lesson = dict(values["lesson"])
        made: Lesson
        if lesson.pop("kind") == TextLesson.kind:
            made = TextLesson(**{**lesson, "documents": tuple(lesson["documents"])})
        else:
            lists = {name: tuple(lesson.get(name, ())) for name in ("turns", "mixture")}
            made = TaskLesson(**{**lesson, **lists})
        return cls(**{**values, "lesson": made})

    def changed_since(self, directory: Path) -> list[str]:
        """In words, why the newest run in `directory` (the directory of all runs) that is this one by the plan is not
        this one after all: other code, libraries or arithmetic. Nothing where there is none, or where it is this one.
        """
        found = [path for path in directory.glob(f"{self._directory_prefix}*/spec.json") if path.is_file()]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                other = RunSpec.load(path.parent)
            except (ValueError, TypeError, KeyError):  # a spec of another version of this package
                continue
            if {**other.identity, "fingerprint": None} == {**self.identity, "fingerprint": None}:
                return changes(other.fingerprint, self.fingerprint)
        return []
