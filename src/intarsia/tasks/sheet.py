"""The sheet of an examination: what was asked and answered, kept in a file after each task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.errors import ConfigError
from intarsia.files import write_json
from intarsia.tasks.exam import Answers
from intarsia.tasks.written import options_of

FORMAT = 1
ASKED = ("task", "options", "seed", "split", "examples")


class Sheet:
    """Results by what was asked; in a file, if there is to be one, which another process goes on with."""

    def __init__(self, model: Mapping[str, Any], path: Path | None = None) -> None:
        """Read what the file has.

        Args:
            model: what says which one it is, JSON-able.

        Raises:
            ConfigError: the file is something else, or of another model.
        """
        self.model = dict(model)
        self._path = path
        self._entries: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            format_, of, entries = found["sheet"], found["model"], list(found["exams"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no sheet of an exam: give --out another file") from None
        if format_ != FORMAT or of != self.model:
            raise ConfigError(
                f"{path} has the exam of another model, or of this one before it was changed: give --out another file"
            )
        self._entries = entries

    def find(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry of what was asked (`asked_of`), if it is there."""
        wanted = json.loads(json.dumps(dict(asked)))
        return next(
            (entry for entry in self._entries if all(entry[name] == wanted[name] for name in ASKED)), None
        )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry, and write the file."""
        self._entries.append(dict(entry))
        if self._path is not None:
            write_json(self._path, {"sheet": FORMAT, "model": self.model, "exams": self._entries})


def asked_of(task: Any, seed: int, split: str, examples: int) -> dict[str, Any]:
    """What says which exam it is."""
    return {
        "task": task.type,
        "options": options_of(task),
        "seed": seed,
        "split": split,
        "examples": examples,
    }


def entry_of(asked: Mapping[str, Any], vocabulary: int, chance: float, answers: Answers) -> dict[str, Any]:
    """An entry of a sheet: what was asked, and counts with intervals."""
    counts = {name: value for name, value in answers.to_dict().items() if name != "by_sequence"}
    return {**asked, "vocabulary": vocabulary, "chance": chance, **counts}


def dials_of(entries: list[dict[str, Any]]) -> list[tuple[str, list[str], list[dict[str, Any]]]]:
    """Tasks that were examined with several values of some options: the task, which options, and its entries."""
    found = []
    for name in dict.fromkeys(entry["task"] for entry in entries):
        of_task = [entry for entry in entries if entry["task"] == name]
        every = dict.fromkeys(option for entry in of_task for option in entry["options"])
        dials = [o for o in every if len({json.dumps(entry["options"].get(o)) for entry in of_task}) > 1]
        if dials:
            found.append((name, dials, of_task))
    return found


def grid_of(
    entries: list[dict[str, Any]], down: str, across: str
) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Accuracy by two options: the values of one, those of the other, and the shares that were examined."""

    def values(option: str) -> list[str]:
        return list(dict.fromkeys(str(entry["options"].get(option)) for entry in entries))

    shares = {
        (str(entry["options"].get(down)), str(entry["options"].get(across))): entry["answers"]["accuracy"]
        for entry in entries
    }
    return values(down), values(across), shares
