"""What the mixers with a state of fixed size share: the state and the cost."""

from __future__ import annotations

import torch
from torch import nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.states import RecurrentState
from intarsia.mixers.base import Cost, Mixer
from intarsia.ops.precision import compute_dtype

CHUNK = 64
"""The tokens of a chunk for which FLOPs are stated."""


class RecurrentMixer(Mixer[RecurrentState]):
    """A mixer with a board `[HV, K, V]` for each sequence and, where it has a short convolution `conv`, the
    convolution's tail."""

    conv: ShortConvolution | None

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.conv = None

    @property
    def board_shape(self) -> tuple[int, int, int]:
        """`(HV, K, V)`: value heads, rows and columns of the state of one sequence."""
        raise NotImplementedError

    def mixing_flops(self) -> int:
        """FLOPs per token of the exchange between tokens."""
        raise NotImplementedError

    def init_state(self, batch_size: int) -> RecurrentState:
        weight = next(self.parameters())
        dtype = compute_dtype(weight)
        board = torch.zeros(batch_size, *self.board_shape, dtype=dtype, device=weight.device)
        if self.conv is None:
            return RecurrentState(board, None, (0,) * batch_size)
        channels, size = self.conv.weight.shape
        return RecurrentState(board, board.new_zeros(batch_size, size - 1, channels), (0,) * batch_size)

    def cost(self) -> Cost:
        weights = [m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | ShortConvolution)]
        mixing_flops = self.mixing_flops()
        return Cost(
            parameters=sum(p.numel() for p in self.parameters()),
            projection_flops=2 * sum(weights),
            mixing_flops=lambda length: mixing_flops,
            fixed_state_bytes=self.init_state(1).nbytes(),
            state_bytes_per_token=0,
        )


def delta_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise delta rule: the Kimi Linear report's equation 13,
    `6 d² + 3 C d + C²` a head, with `K V` for `d²` and `(2 K + V)` for `3 d`."""
    return heads * (6 * key_dim * value_dim + chunk * (2 * key_dim + value_dim) + chunk * chunk)


def dplr_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise general rule, counted as there: the state is read by two vectors and written
    along two, `8 K V` a head; four scores are made and three of them applied, `C (4 K + 3 V)`; the inverse, `C²`."""
    return heads * (8 * key_dim * value_dim + chunk * (4 * key_dim + 3 * value_dim) + chunk * chunk)


def additive_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise additive rule, counted as there: the state is read and written,
    `4 K V` a head, and the chunk's scores are made and applied, `C (K + V)`."""
    return heads * (4 * key_dim * value_dim + chunk * (key_dim + value_dim))
