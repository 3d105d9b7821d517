"""What mixes a token with the few before it: the short convolution and the token shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.recurrent import RecurrentState
from intarsia.ops import Sequences, short_convolution
from intarsia.ops.conv_call import Activation


class ShortConvolution(FillsItself):
    """A causal convolution of each channel with its last `size` inputs, then SiLU unless `activation` is None. Weight
    `[channels, size]`, and where it is asked for, as Mamba has it, a bias `[channels]`."""

    def __init__(
        self, channels: int, size: int, bias: bool = False, activation: Activation | None = "silu"
    ) -> None:
        super().__init__()
        self.activation: Activation | None = activation
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
        """`[B, T, channels]` to the same; the state `[N, size - 1, channels]` holds each sequence's last inputs."""
        y, tail = short_convolution(
            x, self.weight, activation=self.activation if self.bias is None else None, initial_state=state,
            output_final_state=state is not None, cu_seqlens=seqs,
        )  # fmt: skip
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
            y = F.silu(y) if self.activation == "silu" else y
        return y, tail


def short_convolution_of(channels: int, size: int | None) -> ShortConvolution | None:
    """The convolution of a layer that may have none: None where the size is."""
    return None if size is None else ShortConvolution(channels, size)


def inputs_kept(conv: ShortConvolution | None) -> tuple[int, int] | None:
    """What a layer with this convolution keeps of a sequence, `(W - 1, channels)`."""
    return None if conv is None else (conv.weight.shape[1] - 1, conv.weight.shape[0])


def convolve(
    conv: ShortConvolution | None, x: Tensor, state: RecurrentState | None, seqs: Sequences | None
) -> tuple[Tensor, Tensor | None]:
    """`x` `[B, T, channels]` through the convolution of a layer that may have none, after its state; and the
    inputs to remember."""
    return (x, None) if conv is None else conv(x, None if state is None else state.conv, seqs)


def token_before(x: Tensor, first: Tensor | None, seqs: Sequences | None) -> Tensor:
    """What stands one token before in the same sequence, `[B, T, ...]`: before the first token of sequence n stands
    `first[n]` `[N, 1, ...]`, or zero."""
    if seqs is None:
        first = torch.zeros_like(x[:, :1]) if first is None else first.to(x.dtype)
        return torch.cat([first, x[:, :-1]], dim=1)
    numbers = [n for n, length in enumerate(seqs.lengths) if length]
    starts = torch.tensor([seqs.starts[n] for n in numbers], device=x.device)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    if first is None:
        return before.index_fill(1, starts, 0)
    return before.index_copy(1, starts, first[numbers].transpose(0, 1).to(x.dtype))


def last_tokens(x: Tensor, before: Tensor, seqs: Sequences | None) -> Tensor:
    """The last token of each sequence, `[N, 1, ...]` in the dtype of `before` `[N, 1, ...]`, which stands for those
    that have none."""
    if seqs is None:
        return x[:, -1:].to(before.dtype, copy=True)
    if all(seqs.lengths):
        ends = [start + length - 1 for start, length in zip(seqs.starts, seqs.lengths, strict=True)]
        return x[0, ends, None].to(before.dtype)
    row = torch.cat([x.to(before.dtype), before.transpose(0, 1)], dim=1)
    ends = [
        start + length - 1 if length else seqs.total + n
        for n, (start, length) in enumerate(zip(seqs.starts, seqs.lengths, strict=True))
    ]
    return row[0, ends, None]
