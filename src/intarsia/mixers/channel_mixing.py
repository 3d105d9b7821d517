"""RWKV's channel mixing: a feed-forward that sees the token before (RWKV-7, Peng et al. 2025, arXiv:2503.14456)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.convolution import last_tokens, token_before
from intarsia.layers.projections import linear
from intarsia.layers.recurrent import NO_BOARD, RecurrentMemory, RecurrentState, begun, following
from intarsia.mixers.base import About, GeneratorOf, Mixer, MixerConfig, positive
from intarsia.ops import Sequences
from intarsia.ops.pools import gathered


@dataclass(frozen=True)
class ChannelMixingConfig(MixerConfig):
    """The options of RWKV-7's channel mixing: `d_hidden` is how wide it is inside. `depth_fraction`, the layer's number
    over the depth, shapes the initial values; the model sets it. Without `shift` the token before is not seen, and it
    is a feed-forward in a block of its own (Nemotron-H, whose blocks are one thing each)."""

    type: ClassVar[str] = "channel-mix"
    about = About(
        title="RWKV's channel mixing",
        year=2025,
        source="arXiv:2503.14456",
        family="convolution",
        equation="y_t = W_o relu(W_k (x_t + mu (x_{t-1} - x_t)))^2",
        brought="the other half of RWKV: a feed-forward that sees the token before",
        operator="token_shift",
        example={"d_hidden": 4096},
    )
    d_hidden: int
    depth_fraction: float | None = None
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(d_hidden=self.d_hidden)
        if self.depth_fraction is not None and not 0 <= self.depth_fraction < 1:
            raise ConfigError(f"depth_fraction must be in [0, 1); got {self.depth_fraction}")

    def at_layer(self, layer: int, depth: int) -> ChannelMixingConfig:
        return self if self.depth_fraction is not None else replace(self, depth_fraction=layer / depth)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> ChannelMixing:
        return ChannelMixing(d_model, self)


class ChannelMixing(Mixer[RecurrentState]):
    """RWKV-7's channel mixing, for blocks that have no feed-forward (`ModelConfig.mixer_only`):

        y_t = W_o relu(W_k (x_t + mu * (x_{t-1} - x_t)))²

    What is remembered of a sequence is its last token, and nothing else; without the shift (`mu = 0`) not that. Left
    out: the orthogonal initial matrices.
    """

    def __init__(self, d_model: int, config: ChannelMixingConfig) -> None:
        super().__init__(d_model)
        self.config = config
        self.shift = nn.Parameter(torch.empty(d_model)) if config.shift else None
        self.k_proj = linear(d_model, config.d_hidden)
        self.o_proj = linear(config.d_hidden, d_model)
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.shift is None:
            return
        # Deeper layers look less at the token before.
        exponent = (1 - (self.config.depth_fraction or 0.0)) ** 4
        self.shift.copy_(1 - (torch.arange(self.d_model) / self.d_model) ** exponent)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        if self.shift is None:
            y = self.o_proj(torch.relu(self.k_proj(x)).square())
            return y, following(state, x, seqs, None if state is None else state.board, None)
        first = None if state is None else gathered(state.conv)
        before = token_before(x, first, seqs) - x
        y = self.o_proj(torch.relu(self.k_proj(x + before * self.shift.to(x.dtype))).square())
        last = None if first is None else last_tokens(x, first, seqs)
        return y, following(state, x, seqs, None if state is None else state.board, last)

    @property
    def memory(self) -> RecurrentMemory:
        return RecurrentMemory(NO_BOARD, None if self.shift is None else (1, self.d_model))

    def mixing_flops(self, length: int) -> float:
        """None: the token before is mixed in channel by channel."""
        return 0.0
