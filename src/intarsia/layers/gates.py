"""What makes the decays of linear mixers from raw projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.float32 import KeepsFloat32
from intarsia.ops import Gate
from intarsia.ops.precision import widen


def fill_time_steps(dt_bias: Tensor, generator: torch.Generator | None) -> None:
    """Fill a bias so that its softplus is log-uniform in [0.001, 0.1], as in Mamba."""
    dt = dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class DecayGate(FillsItself, KeepsFloat32):
    """The log-decay from a raw projection: `A_log` of each head and `dt_bias` of each channel, in float32.

    softplus: `g = -exp(A_log) softplus(f + dt_bias)`
    bounded:  `g = lower_bound sigmoid(exp(A_log) (f + dt_bias))`

    Initial values as in Mamba: `softplus(dt_bias)` is log-uniform in [0.001, 0.1], `exp(A_log)` uniform in
    [1, 16]; with a bound `A_log` is zero. flash-linear-attention draws KDA's in the same way, and those of its layers
    with a decay of each head from [0, 16].
    """

    float32_names = ("A_log", "dt_bias")

    def __init__(self, heads: int, channels: int, lower_bound: float | None = None) -> None:
        """`channels` of each head; `lower_bound` (negative) selects the bounded gate."""
        super().__init__()
        self.heads, self.channels, self.lower_bound = heads, channels, lower_bound
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * channels))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.lower_bound is None:
            self.A_log.uniform_(1, 16, generator=generator_of("A_log")).log_()
        else:
            self.A_log.zero_()
        fill_time_steps(self.dt_bias, generator_of("dt_bias"))

    def forward(self) -> Gate:
        """What the operator needs to make the log-decay of the raw projection: copies, which outlive FSDP's."""
        return Gate(self.A_log.clone(), self.dt_bias.clone(), self.lower_bound)

    def gate(self) -> Gate:
        """The same of the parameters themselves."""
        return Gate(self.A_log, self.dt_bias, self.lower_bound)


class DecayBias(FillsItself, KeepsFloat32):
    """The bias of a raw decay, `[channels]` in float32; it begins at zero."""

    float32_names = ("bias",)
    drawn_as_parent = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`x + bias`, float32 (float64 for float64)."""
        return widen(x) + self.bias
