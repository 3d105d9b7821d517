"""From the logits of one position to the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        return _probabilities(_checked(logits)[None], [self])[0]


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
        _checked(logits)
        (token,) = choose_each(logits[None], [self])
        assert isinstance(token, int)
        return token

    def point(self) -> torch.Tensor:
        """The next uniform number, float64."""
        return torch.rand((), generator=self._generator, dtype=torch.float64)


def choose_each(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | IntarsiaError]:
    """The next token of each of several texts, from logits `[texts, vocab]`, all at once; the error in its place where
    the logits are of no use, whose sampler draws no number then."""
    scores = logits.detach().to("cpu").double()
    wrong = [_fault(*of_text) for of_text in zip(*_extremes(scores), strict=True)]
    chosen = scores.argmax(-1)
    drawing = [n for n, each in enumerate(samplers) if wrong[n] is None and not each.sampling.is_greedy]
    if drawing:
        cumulative = _probabilities(scores[drawing], [samplers[n].sampling for n in drawing]).cumsum(-1)
        points = torch.stack([samplers[n].point() for n in drawing])[:, None] * cumulative[:, -1:]
        # The first token whose cumulative probability is above the point: one of probability 0 is never that.
        found = torch.searchsorted(cumulative, points, right=True)[:, 0]
        chosen[drawing] = found.clamp(max=cumulative.shape[1] - 1)
    tokens = chosen.tolist()
    return [error or token for error, token in zip(wrong, tokens, strict=True)]


def _probabilities(scores: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The distributions that tokens are drawn from, `[texts, vocab]`, of scores in float64."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([[getattr(each, name)] for each in samplings], dtype=torch.float64)

    greedy = torch.tensor([each.is_greedy for each in samplings])
    temperature = torch.where(greedy[:, None], 1.0, column("temperature"))
    # The largest becomes 0 before the division, so that a tiny temperature cannot overflow it.
    probabilities = torch.softmax((scores - scores.amax(-1, keepdim=True)) / temperature, dim=-1)
    keep = probabilities >= column("min_p") * probabilities.amax(-1, keepdim=True)
    nucleus = [n for n, each in enumerate(samplings) if each.top_p < 1]
    if nucleus:
        ordered, order = torch.sort(probabilities[nucleus], dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(order, dtype=torch.bool)
        keep[nucleus] &= kept.scatter(-1, order, before < column("top_p")[nucleus])
    probabilities = torch.where(keep, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if greedy.any():
        best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        probabilities = torch.where(greedy[:, None], best, probabilities)
    return probabilities


def _extremes(scores: torch.Tensor) -> tuple[list[bool], list[float]]:
    """Of each text whether a score is NaN, and the largest."""
    return torch.isnan(scores).any(-1).tolist(), scores.nan_to_num(
        nan=0.0, posinf=math.inf, neginf=-math.inf
    ).amax(-1).tolist()


def _fault(has_nan: bool, largest: float) -> IntarsiaError | None:
    if has_nan or largest == math.inf:
        return IntarsiaError(
            "the model's logits hold NaN or +inf: its weights are damaged, or training diverged"
        )
    return IntarsiaError("the logits forbid every token") if largest == -math.inf else None


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """The logits as float64 on the CPU, once they are known to be usable."""
    if logits.dim() != 1:
        raise ConfigError(f"the logits of one position are wanted, [vocab], got shape {list(logits.shape)}")
    scores = logits.detach().to("cpu").double()
    for of_text in zip(*_extremes(scores[None]), strict=True):
        if (error := _fault(*of_text)) is not None:
            raise error
    return scores
