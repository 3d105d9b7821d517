"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), stretched by YaRN where that is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import OptionError
from intarsia.layers.states import State
from intarsia.ops import Sequences
from intarsia.ops.precision import compute_dtype
from intarsia.settings import settle_types


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): positions for `factor` times the length that was trained first.

    Pairs of channels that turn more than `fast` times in `original_length` tokens stay as they are, those that
    turn less than `slow` times turn `factor` times slower, and between the two lies a ramp. `truncate` rounds the
    ramp's ends outwards to whole pairs (the published code does, gpt-oss does not). The rotated channels of queries
    and keys are multiplied by `attention_factor`: `0.1 ln(factor) + 1` as in the paper where it is not given.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        for name in ("factor", "original_length", "fast", "slow"):
            if getattr(self, name) <= 0:
                raise OptionError(f"must be positive; got {getattr(self, name)}", (name,))
        if self.fast < self.slow:
            raise OptionError(f"must not be below slow; got {self.fast} and {self.slow}", ("fast",))

    @property
    def magnitude(self) -> float:
        """What the rotated channels are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def stretch(self, frequency: Tensor, theta: float) -> Tensor:
        """The frequencies `[R / 2]` as YaRN changes them."""
        pairs = len(frequency)

        def pair_that_turns(times: float) -> float:
            return pairs * math.log(self.original_length / (times * 2 * math.pi)) / math.log(theta)

        low, high = pair_that_turns(self.fast), pair_that_turns(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The published code takes the number of channels for the last pair, not that of pairs.
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        index = torch.arange(pairs, device=frequency.device, dtype=frequency.dtype)
        ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequency * (1 - ramp + ramp / self.factor)


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0, yarn: Yarn | None = None) -> Tensor:
    """Rotate each pair of channels by an angle that grows with the position.

    Channel i is paired with channel i + R / 2 (the half-split order of GPT-NeoX and of transformers;
    interleaved weights must be permuted when they are loaded).

    Args:
        x: `[B, T, H, R]`, R even.
        positions: `[T]`, or `[B, T]` where the sequences are at different places; integers.
        theta: the base of the angles; pair i turns by `theta ** (-2 i / R)` a token.
        yarn: makes the slow pairs slower.

    Returns:
        `[B, T, H, R]` in the dtype of x; the angles are float32 (float64 for float64).
    """
    R = x.shape[-1]
    # Angles in float64: a float32 product loses the position's low bits beyond some tens of thousands.
    frequency = theta ** (-torch.arange(0, R, 2, device=x.device, dtype=torch.float64) / R)
    if yarn is not None:
        frequency = yarn.stretch(frequency, theta)
    angle = positions.to(torch.float64)[..., None, None] * frequency
    dtype = compute_dtype(x)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if yarn is not None:
        cos, sin = cos * yarn.magnitude, sin * yarn.magnitude
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotate_first(
    x: Tensor, positions: Tensor, channels: int, theta: float = 10000.0, yarn: Yarn | None = None
) -> Tensor:
    """`rotate` for the first `channels` of x `[B, T, H, K]`; the others stay as they are."""
    if not channels:
        return x
    turned, kept = x.split([channels, x.shape[-1] - channels], dim=-1)
    return torch.cat([rotate(turned, positions, theta, yarn), kept], dim=-1)


def positions_of(x: Tensor, state: State | None, seqs: Sequences | None) -> Tensor:
    """Positions of the tokens of x `[B, T, D]` in their sequences, behind those that the state has seen: `[T]`, or
    `[B, T]` where sequences have seen different numbers of tokens."""
    if state is not None:
        return state.positions(x, seqs)
    return torch.arange(x.shape[1], device=x.device) if seqs is None else seqs.positions(x.device)
