"""HGRN2: the forget gate is the key (Qin, Yang, Sun, Shen, Li, Sun, Zhong 2024, arXiv:2404.07904)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.norm import RMSNorm
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class HGRN2Config(NormedConfig, HeadsConfig):
    """The options of HGRN2: `num_heads` heads of `head_dim` (K, the paper's expansion ratio) forget gates and
    `head_v_dim` (V; K by default) inputs. No forget gate falls below `lower_bound`, in [0, 1); None makes it the
    share of the layers below this one."""

    type: ClassVar[str] = "hgrn2"
    about = About(
        title="HGRN2",
        year=2024,
        source="arXiv:2404.07904",
        family="additive",
        equation="S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_t^T,  f_t = exp g_t",
        brought="the forget gate doubles as the key: the state of a gated RNN expands without new weights",
        operator="linear_attention",
        example={"num_heads": 8, "head_dim": 128},
        decay="channel",
    )
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lower_bound is not None and not 0 <= self.lower_bound < 1:
            raise ConfigError(f"lower_bound must be in [0, 1); got {self.lower_bound}")

    def at_layer(self, layer: int, depth: int) -> HGRN2Config:
        """Without a bound of its own layer l of L gets l / L: where the authors' learnt bounds begin."""
        return self if self.lower_bound is not None else dataclasses.replace(self, lower_bound=layer / depth)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> HGRN2:
        return HGRN2(d_model, self, norm_eps)


class HGRN2(Mixer[RecurrentState]):
    """HGRN2, with heads:

        f = b + (1 - b) sigmoid(W_f x)        q = silu(W_q x)        i = W_i x
        S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_tᵀ        y = W_o rmsnorm(S_tᵀ q_t / sqrt(K))

    The norm runs over all heads together and the queries are divided by `sqrt(K)` (which the norm undoes), as in
    flash-linear-attention's layer, the one that the authors refer to.

    Difference: the authors learn the lower bounds b of each channel, as cumulative sums over the layers of a
    softmax of parameters that belong to the whole model. A mixer knows its own layer alone, so b is a number that
    stays where theirs begins: layer l of L has l / L, and the lowest layer none.
    """

    def __init__(self, d_model: int, config: HGRN2Config, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.forget_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.norm = RMSNorm(H * V, config.own_eps(norm_eps))
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        q = F.silu(self.q_proj(x)).unflatten(-1, (H, K))
        k, g = forget_gate(self.forget_proj(x).unflatten(-1, (H, K)), self.config.lower_bound or 0.0)
        v = self.v_proj(x).unflatten(-1, (H, V))
        o, board = linear_attention(q, k.to(q.dtype), v, g, **carried(state, seqs))
        return self.o_proj(self.norm(o.flatten(-2))), following(state, x, seqs, board)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)


def forget_gate(z: Tensor, lower_bound: float) -> tuple[Tensor, Tensor]:
    """`1 - f` and `log f` of `f = b + (1 - b) sigmoid(z)`, in the compute dtype.

    Neither is made by subtracting f from one: gates that forget little would lose the little.
    """
    z = widen(z)
    k = (1 - lower_bound) * torch.sigmoid(-z)
    return k, torch.log1p(-k) if lower_bound > 0 else F.logsigmoid(z)
