"""The feed-forward: where a token is worked on alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.model.config import ExpertsConfig, FeedForwardConfig
from intarsia.model.cost import FeedForwardCost
from intarsia.ops import swiglu

CLAMP = 7.0
"""The limit of the clamped activation where none is said: gpt-oss's."""


def limited_swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """`silu(gate) * up`, with the gate at most `limit` and up within ± that, where there is one."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return swiglu(gate, up)


def relu_squared(x: Tensor) -> Tensor:
    """`relu(x)²` (So et al. 2021)."""
    return torch.relu(x).square()


def activate(gate: Tensor, up: Tensor, config: FeedForwardConfig | ExpertsConfig) -> Tensor:
    """What the activation makes of gate and up, of any shape, both the same; relu2 has no gate."""
    if config.activation == "swiglu":
        return limited_swiglu(gate, up, config.limit)
    if config.activation == "clamped":
        limit = CLAMP if config.limit is None else config.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(config.sharpness * gate)
    if config.activation == "situ":
        # In float32, as its authors compute it: tanh near its ends is where bfloat16 has no digits left.
        dtype, wide = gate.dtype, torch.promote_types(gate.dtype, torch.float32)
        gate, up = _softly(gate.to(wide), config.limit or 1.0) * gate.to(wide).sigmoid(), up.to(wide)
        return (gate * (up if config.up_limit is None else _softly(up, config.up_limit))).to(dtype)
    raise ValueError(f"{config.activation} has no gate")


def _softly(x: Tensor, limit: float) -> Tensor:
    """`x` near zero, and within ± the limit."""
    return limit * torch.tanh(x / limit)


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


class OtherGate(SwiGLU):
    """`down(a(gate(x), up(x)))` with another activation `a` of a gate than SwiGLU's (`activate`); `x` is
    `[..., d_model]`."""

    def __init__(self, d_model: int, config: FeedForwardConfig) -> None:
        super().__init__(d_model, config.d_hidden)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        y: Tensor = self.down(activate(self.gate(x), self.up(x), self.config))
        return y

    @property
    def is_plain(self) -> bool:
        """It is no SwiGLU."""
        return False


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
    if config.activation != "swiglu":
        return OtherGate(d_model, config)
    return SwiGLU(d_model, config.d_hidden, config.limit, config.gate_scale, config.scale)
