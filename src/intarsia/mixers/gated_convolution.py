"""The gated short convolution of LFM2 (Liquid AI 2025, arXiv:2511.23404, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from intarsia.layers.convolution import ShortConvolution, inputs_kept
from intarsia.layers.projections import linear
from intarsia.layers.recurrent import NO_BOARD, RecurrentMemory, RecurrentState, begun, following
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences


@dataclass(frozen=True)
class GatedConvolutionConfig(MixerConfig):
    """The options of the gated short convolution: how many tokens it sees (`conv_size`), and whether its linear maps
    and the convolution have a `bias`."""

    type: ClassVar[str] = "conv"
    about = About(
        title="Gated short convolution",
        year=2025,
        source="arXiv:2511.23404",
        family="convolution",
        equation="y_t = c_t * sum_i w_i (b_{t-i} * v_{t-i})",
        brought="no memory but the last two inputs, between two gates: a few layers of attention look back",
        operator="short_convolution",
        example={"conv_size": 3},
    )
    conv_size: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> GatedConvolution:
        return GatedConvolution(d_model, self)


class GatedConvolution(Mixer[RecurrentState]):
    """The operator of most layers of LFM2:

        b, c, v = W_b x, W_c x, W_v x                  [B, T, D]
        y = W_o (c * conv(b * v))

    The convolution is causal, of each channel, with the last `conv_size` tokens and no activation. What is
    remembered of a sequence is its last `conv_size - 1` inputs, and nothing else.

    Different from the authors' code: the three parts of their `in_proj` are maps of their own.
    """

    def __init__(self, d_model: int, config: GatedConvolutionConfig) -> None:
        super().__init__(d_model)
        self.config = config
        self.input_gate_proj = linear(d_model, d_model, bias=config.bias)
        self.output_gate_proj = linear(d_model, d_model, bias=config.bias)
        self.v_proj = linear(d_model, d_model, bias=config.bias)
        self.conv = ShortConvolution(d_model, config.conv_size, bias=config.bias, activation=None)
        self.o_proj = linear(d_model, d_model, bias=config.bias)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        gated = self.input_gate_proj(x) * self.v_proj(x)
        mixed, inputs = self.conv(gated, None if state is None else state.conv, seqs)
        y = self.o_proj(self.output_gate_proj(x) * mixed)
        return y, following(state, x, seqs, None if state is None else state.board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        return RecurrentMemory(NO_BOARD, inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        """None: the convolution has weights, and is counted with the projections."""
        return 0.0
