"""The feed-forward: where a token is worked on alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.model.config import FeedForwardConfig
from intarsia.model.cost import FeedForwardCost
from intarsia.ops import swiglu


def limited_swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """`silu(gate) * up`, with the gate at most `limit` and up within ± that, where there is one."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return swiglu(gate, up)


def relu_squared(x: Tensor) -> Tensor:
    """`relu(x)²` (So et al. 2021)."""
    return torch.relu(x).square()


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020), without biases; `x` is `[..., d_model]`. `limit` and
    the factors are those of `FeedForwardConfig`."""

    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        limit: float | None = None,
        gate_scale: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.limit, self.gate_scale, self.scale = limit, gate_scale, scale
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        if (self.gate_scale, self.scale) == (1, 1):
            y: Tensor = self.down(limited_swiglu(self.gate(x), self.up(x), self.limit))
            return y
        return self.scale * self.down(limited_swiglu(self.gate_scale * self.gate(x), self.up(x), self.limit))

    @property
    def is_plain(self) -> bool:
        """Whether it has neither limit nor factors."""
        return self.limit is None and (self.gate_scale, self.scale) == (1, 1)

    def cost(self) -> FeedForwardCost:
        """Three products with a matrix per token."""
        parameters = 3 * self.gate.in_features * self.gate.out_features
        return FeedForwardCost(parameters, parameters, 2 * parameters)


class ReluSquared(nn.Module):
    """`down(relu(up(x))²)`, without a gate and without biases, as Nemotron has it; `x` is `[..., d_model]`."""

    residual_outputs: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        y: Tensor = self.down(relu_squared(self.up(x)))
        return y

    def cost(self) -> FeedForwardCost:
        """Two products with a matrix per token."""
        parameters = 2 * self.up.in_features * self.up.out_features
        return FeedForwardCost(parameters, parameters, 2 * parameters)


FeedForward = SwiGLU | ReluSquared


def feed_forward_of(d_model: int, config: FeedForwardConfig) -> FeedForward:
    """The feed-forward of a layer without experts."""
    if config.activation == "relu2":
        return ReluSquared(d_model, config.d_hidden)
    return SwiGLU(d_model, config.d_hidden, config.limit, config.gate_scale, config.scale)
