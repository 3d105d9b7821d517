"""In-context regression: a linear function that only its examples tell."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from intarsia.errors import ConfigError
from intarsia.tasks.base import Dice, OneByOneTask, at_least


@dataclass(frozen=True)
class Regression(OneByOneTask):
    """Points of `dimensions` signs, each with the value of a linear function of the example's own.

        input    + - =  0 + + = 2 - + =      weights 1 and 1
        target   . .  .  . . . . . . . 0

    The weights are whole numbers from `-largest` to `largest`, and a point's value is the sum of signs times
    weights. It is asked at "=" where the points before determine it, whatever the weights: where the point is
    in their span. So all answers can be known, and the values stand in the input behind them. After Garg et
    al., whose numbers are real and whose points are never repeated in one direction; here a model reads tokens.
    """

    type: ClassVar[str] = "regression"
    title: ClassVar[str] = "In-context linear regression"
    source: ClassVar[str] = "arXiv:2208.01066, of tokens"
    dimensions: int = 4
    largest: int = 2

    def __post_init__(self) -> None:
        at_least(1, length=self.length, dimensions=self.dimensions, largest=self.largest)
        size = self.dimensions + 2
        if self.length < 2 * size:
            raise ConfigError(
                f"a point takes {size} tokens and at least two are needed; the length is {self.length}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        most = self.dimensions * self.largest
        return ("+", "-", "=", *(str(value) for value in range(-most, most + 1)), "_")

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        d, most = self.dimensions, self.dimensions * self.largest
        weights = [weight - self.largest for weight in dice.several(2 * self.largest + 1, d)]
        tokens: list[int] = []
        asked: dict[int, int] = {}
        seen = Span()
        for _ in range(self.length // (d + 2)):
            minus = dice.several(2, d)
            signs = [1 - 2 * bit for bit in minus]
            value = 3 + most + sum(sign * weight for sign, weight in zip(signs, weights, strict=True))
            if not seen.add(signs):
                asked[len(tokens) + d] = value
            tokens += [*minus, 2, value]
        return tokens, asked


class Span:
    """The span of some vectors, in exact arithmetic."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, list[Fraction]]] = []

    def add(self, vector: list[int]) -> bool:
        """Add a vector; whether the span has grown."""
        left = [Fraction(number) for number in vector]
        for place, row in self._rows:
            if factor := left[place]:
                left = [a - factor * b for a, b in zip(left, row, strict=True)]
        pivot = next((place for place, number in enumerate(left) if number), None)
        if pivot is None:
            return False
        self._rows.append((pivot, [number / left[pivot] for number in left]))
        return True
