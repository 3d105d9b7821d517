"""How well answers meet the targets: by token and by whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.model.loss import IGNORED


@dataclass(frozen=True)
class Score:
    """Counts of right answers. Scores of parts add up to the score of the whole: `a + b`."""

    right_tokens: int
    tokens: int
    """Targets that were asked."""
    right_sequences: int
    """Sequences all of whose answers are right."""
    sequences: int
    """Sequences of which anything was asked."""

    def __add__(self, other: Score) -> Score:
        return Score(
            self.right_tokens + other.right_tokens,
            self.tokens + other.tokens,
            self.right_sequences + other.right_sequences,
            self.sequences + other.sequences,
        )

    @property
    def token_accuracy(self) -> float:
        """The share of the targets that were met; NaN where none was asked."""
        return self.right_tokens / self.tokens if self.tokens else float("nan")

    @property
    def sequence_accuracy(self) -> float:
        """The share of the sequences without a mistake; NaN where none was asked."""
        return self.right_sequences / self.sequences if self.sequences else float("nan")


NOTHING = Score(0, 0, 0, 0)
"""The score of no answers: where sums begin."""


def score(answers: Tensor, targets: Tensor) -> Score:
    """Compare answers with targets, where something is asked; arguments and errors as in `right_and_asked`."""
    right, asked = right_and_asked(answers, targets)
    is_asked = asked > 0
    counts = torch.stack([right.sum(), asked.sum(), (is_asked & (right == asked)).sum(), is_asked.sum()])
    return Score(*counts.tolist())


def right_and_asked(answers: Tensor, targets: Tensor) -> Tensor:
    """How many answers of each sequence are right, and how many are asked: `[2, N]` int64.

    Args:
        answers: logits `[N, T, V]`, floating, whose largest is the answer (none, if any is NaN); or the answers
            themselves, `[N, T]` integers.
        targets: `[N, T]` int64, -100 where nothing is asked.

    Raises:
        ShapeError: the two do not fit together.
    """
    is_logits = answers.is_floating_point()
    if targets.dim() != 2 or answers.shape[:2] != targets.shape or answers.dim() != 2 + is_logits:
        raise ShapeError(
            "answers must be logits [N, T, V] or integers [N, T] and targets [N, T]; "
            f"got {list(answers.shape)} {answers.dtype} and {list(targets.shape)}"
        )
    asked = targets != IGNORED
    right = asked & ((answers.argmax(-1) if is_logits else answers) == targets)
    if is_logits:
        # argmax takes NaN for the largest: a model that has come apart would be right now and then.
        right &= ~answers.isnan().any(-1)
    return torch.stack([right.sum(1), asked.sum(1)])
