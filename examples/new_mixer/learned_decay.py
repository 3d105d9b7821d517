"""Retention whose decays are learnt: the example of docs/new-mixer.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, carried, following
from intarsia.mixers import About, Mixer, MixerConfig
from intarsia.mixers.base import GeneratorOf, positive
from intarsia.ops import Sequences, linear_attention


@dataclass(frozen=True)
class LearnedDecayConfig(MixerConfig):
    """`num_heads` heads of `head_dim` channels, each with one decay that does not depend on the token."""

    type: ClassVar[str] = "learned-decay"
    about = About(
        title="Retention with learnt decays",
        year=2026,
        source="docs/new-mixer.md",
        family="additive",
        equation="S_t = sigmoid(w) S_{t-1} + k_t v_t^T",
        brought="an example of how a mixer is added",
        operator="linear_attention",
        example={"num_heads": 8, "head_dim": 128},
        decay="fixed",
    )
    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> LearnedDecay:
        return LearnedDecay(d_model, self)


class Decays(FillsItself, KeepsFloat32):
    """The log-decay of each head, `log sigmoid(w)`."""

    float32_names = ("w",)

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.w.uniform_(2, 6, generator=generator_of("w"))  # half of the past is gone after 5 to 280 tokens

    def forward(self) -> Tensor:
        return nn.functional.logsigmoid(self.w)


class LearnedDecay(Mixer[RecurrentState]):
    """`S_t = sigmoid(w_h) S_{t-1} + k_t v_tᵀ`, `y = W_o S_tᵀ q_t / sqrt(K)`."""

    def __init__(self, d_model: int, config: LearnedDecayConfig) -> None:
        super().__init__(d_model)
        self.config = config
        H, K = config.num_heads, config.head_dim
        self.qkv_proj = nn.Linear(d_model, 3 * H * K, bias=False)
        self.decays = Decays(H)
        self.o_proj = nn.Linear(H * K, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.config.num_heads, -1)).unbind(-3)
        o, board = linear_attention(q, k, v, self.decays(), **carried(state, seqs))
        return self.o_proj(o.flatten(-2)), following(state, x, seqs, board)

    @property
    def memory(self) -> RecurrentMemory:
        return RecurrentMemory(board=(self.config.num_heads, self.config.head_dim, self.config.head_dim))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
