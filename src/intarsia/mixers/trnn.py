"""T-RNN: a gated average of each channel, with no matrix between steps (Balduzzi, Ghifary 2016, arXiv:1602.02218)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.gates import DecayBias
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class TRNNConfig(MixerConfig):
    """The options of T-RNN: how many `channels` are remembered; the model's width by default."""

    type: ClassVar[str] = "trnn"
    about = About(
        title="Strongly-typed RNN",
        year=2016,
        source="arXiv:1602.02218",
        family="additive",
        equation="h_t = f_t * h_{t-1} + (1 - f_t) * W x_t,  f_t = sigmoid(V x_t + b)",
        brought="a decay of each dimension that the input alone decides: all steps can be computed at once",
        operator="linear_attention",
        example={"channels": 1024},
        decay="channel",
    )
    channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(channels=self.channels)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> TRNN:
        return TRNN(d_model, self)


class TRNN(Mixer[RecurrentState]):
    """The T-RNN of the paper, with a projection back to the model's width:

        z_t = W x_t        f_t = sigmoid(V x_t + b)        h_t = f_t * h_{t-1} + (1 - f_t) * z_t        y = W_o h_t

    LSTM and GRU multiply the last hidden state with a matrix before they gate it; this is the earliest published
    layer known to us whose gates read the input alone, so that the recurrence is linear and of each dimension: it
    appeared in February 2016. The QRNN (Bradbury et al., November 2016, arXiv:1611.01576) is the same recurrence
    ("fo-pooling") with `z = tanh(…)`, an output gate, and inputs that look back over a few tokens.

    For the operator each channel is a head with one row and one column: `q = k = 1`, `v = (1 - f) z`, `g = log f`.
    Differences: W_o, which the paper leaves to the layer above; `b` begins at zero.
    """

    def __init__(self, d_model: int, config: TRNNConfig) -> None:
        super().__init__(d_model)
        self.config = config
        channels = d_model if config.channels is None else config.channels
        self.v_proj = nn.Linear(d_model, channels, bias=False)
        self.decay_proj = nn.Linear(d_model, channels, bias=False)
        self.decay = DecayBias(channels)
        self.o_proj = nn.Linear(channels, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        z = self.v_proj(x)
        f = self.decay(self.decay_proj(x))
        # 1 - f as a sigmoid of its own: where little is forgotten the difference would lose the little.
        v = torch.sigmoid(-f) * widen(z)
        one = v.new_ones(*v.shape[:2], 1, 1)
        h, board = linear_attention(
            one, one, v[..., None], F.logsigmoid(f), scale=1.0, **carried(state, seqs)
        )
        return self.o_proj(h.squeeze(-1).to(z.dtype)), following(state, x, seqs, board)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((self.d_model if c.channels is None else c.channels, 1, 1))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
