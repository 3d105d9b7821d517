"""Examining a model on a task: its answers, counted, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from intarsia.errors import ConfigError
from intarsia.model import LanguageModel
from intarsia.tasks.base import ExampleSplit, Task
from intarsia.tasks.score import Score, right_and_asked

CONFIDENCE = 0.95
ROWS = 16
"""Examples in one forward pass."""


@dataclass(frozen=True)
class Answers:
    """How many answers of each sequence were right, and how many were asked."""

    right: tuple[int, ...]
    asked: tuple[int, ...]

    @property
    def score(self) -> Score:
        """The counts of all together."""
        flawless = sum(right == asked > 0 for right, asked in zip(self.right, self.asked, strict=True))
        return Score(sum(self.right), sum(self.asked), flawless, sum(asked > 0 for asked in self.asked))

    @property
    def perfect(self) -> bool:
        """Whether everything that was asked was answered rightly."""
        return self.right == self.asked

    def token_interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """An interval for the share of right answers among all that such examples ask.

        Wilson's, for as many independent answers as would scatter like the sequences do (Kish's design effect): the
        answers of one sequence are right or wrong together. No more than were asked; and, where all are right or all
        wrong so that nothing scatters, no more than there are sequences.
        """
        right, asked = np.array(self.right, np.float64), np.array(self.asked, np.float64)
        right, asked = right[asked > 0], asked[asked > 0]
        sequences, total = len(asked), float(asked.sum())
        if not sequences:
            return 0.0, 1.0
        share = float(right.sum()) / total
        independent = float(sequences)
        if sequences > 1 and 0 < share < 1:
            scatter = float(((right - share * asked) ** 2).sum()) * sequences / (sequences - 1) / total**2
            independent = min(total, share * (1 - share) / scatter) if scatter else total
        return wilson(share, independent, confidence)

    def sequence_interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's interval for the share of sequences without a mistake."""
        score = self.score
        return wilson(score.sequence_accuracy, score.sequences, confidence) if score.sequences else (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Counts, shares and intervals, JSON-able; null for a share of nothing."""
        score = self.score
        return {
            "answers": {
                "right": score.right_tokens,
                "asked": score.tokens,
                "accuracy": score.token_accuracy if score.tokens else None,
                "interval": list(self.token_interval()),
            },
            "sequences": {
                "right": score.right_sequences,
                "asked": score.sequences,
                "accuracy": score.sequence_accuracy if score.sequences else None,
                "interval": list(self.sequence_interval()),
            },
            "confidence": CONFIDENCE,
            "by_sequence": {"right": list(self.right), "asked": list(self.asked)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answers:
        """What `to_dict` gave."""
        counts = values["by_sequence"]
        return cls(tuple(counts["right"]), tuple(counts["asked"]))


def wilson(share: float, trials: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a probability of which a share of `trials` independent trials was seen."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # At 0 and 1 the ends are exact, and rounding must not move them.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


@torch.no_grad()
def examine(
    model: LanguageModel,
    task: Task,
    *,
    seed: int = 0,
    examples: int = 256,
    split: ExampleSplit = "test",
    rows: int = ROWS,
) -> Answers:
    """A model's answers to the first examples of a split. Its parameters say on which device.

    The task's tokens are taken for the model's first ones.

    Args:
        rows: examples in one forward pass; changes nothing but rounding.

    Raises:
        ConfigError: the model has too few tokens for the task, or none of the examples asks anything.
    """
    check_vocabulary(task, model.config.vocab_size)
    right: list[int] = []
    asked: list[int] = []
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    try:
        for start in range(0, examples, rows):
            inputs, targets = task.examples(seed, range(start, min(start + rows, examples)), split)
            logits = model(inputs.to(device)).logits
            assert logits is not None
            counts = right_and_asked(logits, targets.to(device))
            right += counts[0].tolist()
            asked += counts[1].tolist()
    finally:
        model.train(was_training)
    if not any(asked):
        raise ConfigError(f"none of {examples} {split} examples of {task} asks anything: take longer or more")
    return Answers(tuple(right), tuple(asked))


def check_vocabulary(task: Task, vocab_size: int) -> None:
    """Raise ConfigError where a model of so many tokens cannot be examined on a task."""
    if task.vocab_size > vocab_size:
        raise ConfigError(
            f"the task {task.type!r} has {task.vocab_size} different tokens and the model {vocab_size}: give the "
            "task options that need fewer, or a model that was made for it"
        )
