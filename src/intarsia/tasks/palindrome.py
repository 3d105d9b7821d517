"""Palindrome: say a sequence again, backwards (Kimi Linear report, arXiv:2510.26692, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import Integers, Task, at_least, below, ignored, numbered


@dataclass(frozen=True)
class Palindrome(Task):
    """Random tokens, a separator, and the tokens in reverse order, of which each but the first is asked.

        input    O G R S U N E <sep> E N U S R G O
        target   . . . . . . . .     N U S R G O .

    As in the report's table, the separator asks for nothing (there, the last token would have to be repeated),
    and each token of the second half asks for the one after it.

    The report does not say, and here it is so:

    * The tokens are drawn uniformly, with repetition, from `symbols` of them, 64 unless said otherwise.
    * An odd `length` has `length // 2` tokens to reverse. An even one has them too, and the last token of the
      second half, which asks for nothing, is cut off: `length` is exact without padding.
    """

    type: ClassVar[str] = "palindrome"
    title: ClassVar[str] = "Palindrome"
    source: ClassVar[str] = "arXiv:2510.26692, section 5.1"
    symbols: int = 64

    def __post_init__(self) -> None:
        at_least(2, symbols=self.symbols)
        at_least(1, length=self.length)
        if self.length < 4:
            raise ConfigError(
                f"length must be at least 4: two tokens, the separator and the first of the answer; "
                f"got {self.length}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("s", self.symbols), "<sep>")

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _draws(self) -> int:
        return self.length // 2

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        tokens = below(self.symbols, random)
        separator = np.full_like(tokens[:, :1], self.symbols)
        inputs = np.concatenate([tokens, separator, tokens[:, ::-1]], axis=1)
        targets = ignored(inputs)
        first = tokens.shape[1] + 1
        targets[:, first:-1] = inputs[:, first + 1 :]
        return inputs[:, : self.length], targets[:, : self.length]
