"""Forgetting Transformer: softmax attention with a forget gate (Lin et al. 2025, arXiv:2503.02130)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.convolution import last_tokens, token_before
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import GatedNorm, RMSNorm
from intarsia.layers.projections import linear
from intarsia.mixers.base import About, Mixer, NormedConfig, positive
from intarsia.ops import Sequences, cumulative_log_gate, softmax_attention
from intarsia.ops.keys import Keys
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class ForgettingConfig(NormedConfig):
    """The options of forgetting attention: `num_heads` heads of `head_dim` for queries, keys and values.

    The paper's "Pro" block has all three of `qk_norm` (RMSNorm of each head's queries and keys), `output_gate`
    (RMSNorm of each head's output, times a sigmoid gate) and `kv_shift` (keys and values mixed with the token
    before, by a share that each head computes from the input).
    """

    type: ClassVar[str] = "fox"
    about = About(
        title="Forgetting attention (FoX)",
        year=2025,
        source="arXiv:2503.02130",
        family="softmax",
        equation="o_t = sum_j softmax_j(q_t k_j / sqrt(K) + g_{j+1} + .. + g_t) v_j",
        brought="softmax attention that forgets by what it reads, and so needs no positions",
        operator="softmax_attention",
        decay="head",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_heads: int
    head_dim: int
    qk_norm: bool = False
    output_gate: bool = False
    kv_shift: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> ForgettingAttention:
        return ForgettingAttention(d_model, self, norm_eps)


class ForgettingAttention(Mixer[GrowingState]):
    """`y = W_o o` with `o` of `softmax_attention` with a forget gate, and `f = sigmoid(W x + b)` of each head.

    With `kv_shift` `k_t = a_t k'_{t-1} + (1 - a_t) k'_t`, `k' = W x`, `a = sigmoid(W x)` of each head, and so
    `v`; nothing stands before the first token. With `output_gate` `y = W_o (sigmoid(W x) * rmsnorm_head(o))`. The
    bias b begins at zero, as in the authors' code.

    Differences from the authors' code: the weights of the norms of heads are shared by all heads; the log gate
    is bounded below by `LEAST_LOG_GATE`. flash-linear-attention's layer differs more: its output gate multiplies the
    heads' outputs as they are, without a norm, it has no shift of keys and values, and its norms of queries and keys
    have weights of each head; on the other side it has grouped heads and biases.
    """

    def __init__(self, d_model: int, config: ForgettingConfig, norm_eps: float = 1e-5) -> None:
        norm_eps = config.own_eps(norm_eps)
        super().__init__(d_model)
        self.config = config
        H, K = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * K, bias=False)
        self.f_proj = linear(d_model, H, bias=True)
        if config.kv_shift:
            self.k_shift_proj = nn.Linear(d_model, H, bias=False)
            self.v_shift_proj = nn.Linear(d_model, H, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(K, norm_eps), RMSNorm(K, norm_eps)
        if config.output_gate:
            self.g_proj = nn.Linear(d_model, H * K, bias=False)
            self.norm = GatedNorm(K, norm_eps, "sigmoid")
        self.o_proj = nn.Linear(H * K, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GrowingState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, GrowingState | None]:
        self.check_input(x, state, seqs)
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.kv_shift:
            own, before = {"shifted_key": k, "shifted_value": v}, {}
            if state is not None:
                before = {name: state.fixed(name) for name in own}
            k = shift(k, self.k_shift_proj(x), before.get("shifted_key"), seqs)
            v = shift(v, self.v_shift_proj(x), before.get("shifted_value"), seqs)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        sum_before = None if state is None else state.last("log_gate")
        c = cumulative_log_gate(F.logsigmoid(widen(self.f_proj(x))), sum_before, seqs)
        keys: Keys = k
        values: Keys = v
        sums: Keys = c
        if state is not None:
            grown = state.grow(x, seqs)
            if self.config.kv_shift:
                for name, x_own in own.items():
                    grown.fix(name, last_tokens(x_own, before[name], seqs))
            keys, values, sums = grown.append(keys=k, values=v, log_gate=c)
            state = grown.end()
        o = softmax_attention(q, keys, values, log_gate=sums, cu_seqlens=seqs)
        if self.config.output_gate:
            o = self.norm(o, self.g_proj(x).unflatten(-1, heads))
        return self.o_proj(o.flatten(-2)), state

    @property
    def memory(self) -> GrowingMemory:
        """Keys, values and the sums of the log gates; of the last token what the next one's are mixed with."""
        heads = (self.config.num_heads, self.config.head_dim)
        growing = {
            "keys": Entry(heads),
            "values": Entry(heads),
            "log_gate": Entry(heads[:1], torch.float64),
        }
        shifted = ("shifted_key", "shifted_value") if self.config.kv_shift else ()
        return GrowingMemory("growing", growing, {name: Entry((1, *heads)) for name in shifted})

    def mixing_flops(self, length: int) -> float:
        return softmax_attention_flops(
            self.config.num_heads, self.config.head_dim, self.config.head_dim, length
        )


def shift(x: Tensor, raw_share: Tensor, before: Tensor | None, seqs: Sequences | None) -> Tensor:
    """`a_t x_{t-1} + (1 - a_t) x_t` with `a = sigmoid(raw_share)`, in the dtype of x.

    `x` `[B, T, H, K]`, `raw_share` `[B, T, H]`, `before` `[N, 1, H, K]` the `x` before the first (zero without).
    """
    past = token_before(x, before, seqs)
    share = torch.sigmoid(widen(raw_share))[..., None]
    return (share * past + (1 - share) * x).to(x.dtype)
