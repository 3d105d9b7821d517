"""Parts that the linear mixers are made of: the short convolution, the decay gate, the gated norm."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.mixers.filling import FillsItself, GeneratorOf, linear
from intarsia.mixers.float32 import KeepsFloat32
from intarsia.ops import Gate, Sequences, gated_rms_norm, short_convolution
from intarsia.ops.precision import widen

OutputGate = Literal["sigmoid", "swish", "none"]


class ShortConvolution(FillsItself):
    """A causal convolution of each channel with its last `size` inputs, then SiLU. Weight `[channels, size]`, and
    where it is asked for, as Mamba has it, a bias `[channels]`."""

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        # Uniform in ±1/sqrt(size), PyTorch's own choice for a convolution with one input channel.
        bound = self.weight.shape[1] ** -0.5
        for name, parameter in self._parameters.items():
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator_of(name))

    def forward(
        self, x: Tensor, state: Tensor | None, seqs: Sequences | None
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, channels]` to the same; the state holds the last `size - 1` inputs."""
        y, tail = short_convolution(
            x, self.weight, activation="silu" if self.bias is None else None, initial_state=state,
            output_final_state=state is not None, cu_seqlens=seqs,
        )  # fmt: skip
        return (y if self.bias is None else F.silu(y + self.bias.to(y.dtype))), tail


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


class GatedNorm(FillsItself):
    """RMSNorm of each head, times a gate: `weight * o / rms(o) * gate(z)`, in float32. Weight `[head_v_dim]`."""

    def __init__(self, dim: int, eps: float, gate: OutputGate) -> None:
        super().__init__()
        self.eps, self.gate = eps, gate
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        nn.init.ones_(self.weight)

    def forward(self, o: Tensor, z: Tensor | None) -> Tensor:
        """`o` and the raw gate `z` (None where `gate` is "none"), both `[B, T, HV, V]`; the result in o's dtype."""
        return gated_rms_norm(
            o, z, self.weight, eps=self.eps, gate=None if self.gate == "none" else self.gate
        )


def low_rank(d_in: int, d_out: int, rank: int | None, bias: bool = False) -> nn.Module:
    """A projection through `rank` dimensions, or a plain one where the rank is None; the bias is that of the output."""
    if rank is None:
        return linear(d_in, d_out, bias)
    return nn.Sequential(linear(d_in, rank), linear(rank, d_out, bias))


def token_before(x: Tensor, first: Tensor | None, seqs: Sequences | None) -> Tensor:
    """What stands one token before in the same sequence, `[B, T, ...]`: before the first token stands `first`
    `[B, 1, ...]`, or zero."""
    before = torch.cat([torch.zeros_like(x[:, :1]) if first is None else first.to(x.dtype), x[:, :-1]], dim=1)
    if seqs is None:
        return before
    begins = seqs.positions(x.device) == 0
    return before.masked_fill(begins.view(-1, *[1] * (x.dim() - 2)), 0)
