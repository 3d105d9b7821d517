"""Several difficulties of one task, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np

from intarsia.errors import ConfigError
from intarsia.tasks.base import ExampleSplit, Integers, Task


@dataclass(frozen=True)
class Mixed(Task):
    """The first example is one of the first part, the next one of the second, and so on in turn.

    Example `i` is example `i` of its part, so that no random number is used twice. All parts have the length and the
    tokens of the first.
    """

    type: ClassVar[str] = "mixed"
    title: ClassVar[str] = "Several difficulties in turn"
    source: ClassVar[str] = "here"
    parts: tuple[Task, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError("parts must be at least one task")
        first = self.parts[0]
        for part in self.parts:
            if part.length != self.length:
                raise ConfigError(
                    f"all parts must have the length, {self.length}; one has {part.length}: batches have one length"
                )
            if part.names != first.names:
                raise ConfigError(
                    f"all parts must have the same tokens; one has {part.vocab_size} and another {first.vocab_size}, "
                    "or with other names: give the options that decide the tokens"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return self.parts[0].names

    def _arrays(self, seed: int, rows: range, split: ExampleSplit) -> tuple[Integers, Integers]:
        inputs = np.empty((len(rows), self.length), dtype=np.int64)
        targets = np.empty_like(inputs)
        for place, row in enumerate(rows):
            example = self.parts[row % len(self.parts)].examples(seed, range(row, row + 1), split)
            inputs[place], targets[place] = example.inputs[0].numpy(), example.targets[0].numpy()
        return inputs, targets


def combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of values of options, the last option changing first; none of no options."""
    if not values:
        return []
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
