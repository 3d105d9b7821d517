"""From the logits of one position to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from intarsia.errors import ConfigError, IntarsiaError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it. Below 1 is more careful, above 1 more daring; 0 is greedy.
        top_p: keep the smallest set of most probable tokens whose probabilities reach this sum (nucleus
            sampling, Holtzman et al. 2019). 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the most probable one (Nguyen et al. 2024).
            0 keeps all.
        greedy: always take the most probable token (of equals, the one with the lowest id); the others are
            then without effect.

    `top_p` and `min_p` both read the distribution after the temperature, and a token stays if both keep it,
    so there is no order between them. The most probable token always stays.

    Raises:
        ConfigError: a number outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is the most probable token, without any chance."""
        return self.greedy or self.temperature == 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that the next token is drawn from.

        Args:
            logits: `[vocab]`, any floating dtype. `-inf` forbids a token.

        Returns:
            `[vocab]` float64 on the CPU, summing to 1. The arithmetic is done there so that the same logits
            and the same seed give the same token on every device.

        Raises:
            IntarsiaError: the logits hold NaN or `+inf`, or forbid every token.
        """
        scores = _checked(logits)
        if self.is_greedy:
            return torch.nn.functional.one_hot(scores.argmax(), scores.numel()).double()
        # The largest becomes 0 before the division, so that a tiny temperature cannot overflow it.
        probabilities = torch.softmax((scores - scores.max()) / self.temperature, dim=-1)
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if self.top_p < 1:
            ordered, order = torch.sort(probabilities, descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            keep[order] = before < self.top_p
        if self.min_p > 0:
            keep &= probabilities >= self.min_p * probabilities.max()
        probabilities = torch.where(keep, probabilities, 0.0)
        return probabilities / probabilities.sum()


GREEDY = Sampling(greedy=True)


class Sampler:
    """Chooses tokens by a `Sampling`, with a generator of its own.

    Each token uses one uniform number (the inverse of the cumulative distribution), so that the stream of
    random numbers depends on the seed alone.
    """

    def __init__(self, sampling: Sampling, seed: int = 0) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The id of the next token, from the `[vocab]` logits of the last position."""
        if self.sampling.is_greedy:
            return int(_checked(logits).argmax())
        cumulative = self.sampling.probabilities(logits).cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # The first token whose cumulative probability is above the point: one of probability 0 is never that.
        return int(torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.numel() - 1))


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """The logits as float64 on the CPU, once they are known to be usable."""
    if logits.dim() != 1:
        raise ConfigError(f"the logits of one position are wanted, [vocab], got shape {list(logits.shape)}")
    scores = logits.detach().to("cpu").double()
    if torch.isnan(scores).any() or (scores == math.inf).any():
        raise IntarsiaError(
            "the model's logits hold NaN or +inf: its weights are damaged, or training diverged"
        )
    if (scores == -math.inf).all():
        raise IntarsiaError("the logits forbid every token")
    return scores
