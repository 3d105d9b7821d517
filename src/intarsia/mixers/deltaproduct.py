"""DeltaProduct: several steps of the delta rule for each token (Siems et al. 2025, arXiv:2502.10297)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.flops import delta_rule_flops
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig, check_output_gate, positive
from intarsia.ops import Sequences, gated_delta_rule


@dataclass(frozen=True)
class DeltaProductConfig(NormedConfig, HeadsConfig):
    """The options of DeltaProduct; the defaults are those of the authors' layer, Gated DeltaProduct.

    `num_heads` query and key heads of `head_dim` (K), as many value heads of `head_v_dim` (V; K by default).
    `steps` is n_h, the delta-rule steps of a token, each with a key, value and beta of its own. `decay` is that of
    each head, once a token (Gated DeltaProduct); without it this is DeltaProduct. `negative_eigenvalues` lets beta
    reach 2, so that a step can reflect and the product of two can rotate.
    """

    type: ClassVar[str] = "deltaproduct"
    about = About(
        title="DeltaProduct",
        year=2025,
        source="arXiv:2502.10297",
        family="delta",
        equation="S = exp(g_t) S_{t-1}; n times: S = (I - b k k^T) S + b k v^T",
        brought="tracks states that one step a token cannot, such as permutations, by products of reflections",
        operator="gated_delta_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="head",
    )
    steps: int = 2
    conv_size: int | None = 4
    decay: bool = True
    output_gate: OutputGate = "swish"
    negative_eigenvalues: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(steps=self.steps, conv_size=self.conv_size)
        check_output_gate(self.output_gate)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> DeltaProduct:
        return DeltaProduct(d_model, self, norm_eps)


class DeltaProduct(Mixer[RecurrentState]):
    """DeltaProduct, and with a decay Gated DeltaProduct.

    S_{t,0} = exp(g_t) S_{t-1}                                                        g as in Gated DeltaNet
    S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}ᵀ) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}ᵀ        j = 1 … n
    y = W_o (silu(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))                            S_t = S_{t,n}

    `n = steps`; keys of length one as in DeltaNet, beta in [0, 2]. For the operator a token is
    n tokens, of which the first alone decays and the last alone is read.

    Unlike in the authors' layer, in flash-linear-attention, there are as many value heads as key heads, and without
    a convolution there is no SiLU either, which theirs keeps on q, k and v.
    """

    def __init__(self, d_model: int, config: DeltaProductConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        n, H, K, V = config.steps, config.num_heads, config.head_dim, config.value_dim
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, m) for m in (H * K, n * H * K, n * H * V))
        self.conv = short_convolution_of((n + 1) * H * K + n * H * V, config.conv_size)
        self.beta_proj = linear(d_model, n * H)
        self.decay_proj = linear(d_model, H) if config.decay else None
        self.decay = DecayGate(H, 1) if config.decay else None
        self.output_gate_proj = None if config.output_gate == "none" else linear(d_model, H * V)
        self.norm = GatedNorm(V, config.own_eps(norm_eps), config.output_gate)
        self.o_proj = linear(H * V, d_model)
        self.beta_max = 2 if config.negative_eigenvalues else 1

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        (H, K, V), n = self.memory.board, self.config.steps
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (n * H, K), (n * H, V))
        g = None
        if self.decay is not None and self.decay_proj is not None:
            g = self.decay().log_decay(self.decay_proj(x))
            g = F.pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)  # the first step alone decays
        steps = None if seqs is None else Sequences(tuple(n * length for length in seqs.lengths))
        o, board = gated_delta_rule(
            q.repeat_interleave(n, dim=1),
            _steps(k, n),
            _steps(v, n),
            g,
            _steps(self.beta_proj(x), n),
            normalize=True,
            beta_max=self.beta_max,
            **carried(state, steps),
        )
        o = o[:, n - 1 :: n]
        z = None if self.output_gate_proj is None else self.output_gate_proj(x)
        return self.o_proj(self.norm(o, z).flatten(-2)), following(state, x, seqs, board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return self.config.steps * delta_rule_flops(*self.memory.board)


def _steps(x: Tensor, n: int) -> Tensor:
    """`[B, T, n * heads, ...]` to `[B, T * n, heads, ...]`: a token's steps behind each other."""
    return x.unflatten(2, (n, -1)).flatten(1, 2)
