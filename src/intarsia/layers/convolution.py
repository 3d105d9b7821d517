"""What mixes a token with the few before it: the short convolution and the token shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.ops import Sequences, short_convolution


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


def token_before(x: Tensor, first: Tensor | None, seqs: Sequences | None) -> Tensor:
    """What stands one token before in the same sequence, `[B, T, ...]`: before the first token stands `first`
    `[B, 1, ...]`, or zero."""
    before = torch.cat([torch.zeros_like(x[:, :1]) if first is None else first.to(x.dtype), x[:, :-1]], dim=1)
    if seqs is None:
        return before
    begins = seqs.positions(x.device) == 0
    return before.masked_fill(begins.view(-1, *[1] * (x.dim() - 2)), 0)
