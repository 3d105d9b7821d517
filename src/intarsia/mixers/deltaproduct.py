"""DeltaProduct: several steps of the delta rule for each token (Siems et al. 2025, arXiv:2502.10297)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import OutputGate
from intarsia.mixers.base import About, NormedConfig, positive
from intarsia.mixers.delta import DeltaLayer
from intarsia.mixers.heads import HeadsConfig, check_output_gate
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


class DeltaProduct(DeltaLayer):
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
        norm_eps = config.own_eps(norm_eps)
        H, V = config.num_heads, config.value_dim
        super().__init__(
            d_model,
            heads=H,
            key_dim=config.head_dim,
            value_heads=H,
            value_dim=V,
            steps=config.steps,
            conv_size=config.conv_size,
        )
        self.config = config
        self.beta_max = 2 if config.negative_eigenvalues else 1
        self.beta_proj = nn.Linear(d_model, config.steps * H, bias=False)
        self.decay_proj = nn.Linear(d_model, H, bias=False) if config.decay else None
        self.decay = DecayGate(H, 1) if config.decay else None
        gated = config.output_gate != "none"
        self.add_output(
            config.output_gate, nn.Linear(d_model, H * V, bias=False) if gated else None, norm_eps
        )

    def mix(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, board: Tensor | None, seqs: Sequences | None
    ) -> tuple[Tensor, Tensor | None]:
        n, H = self.steps, self.heads

        def steps(y: Tensor, *shape: int) -> Tensor:
            """`[B, T, n * numbers]` to `[B, T n, *shape]`: a token's steps behind each other."""
            return y.unflatten(-1, (n, *shape)).flatten(1, 2)

        g = None
        if self.decay is not None and self.decay_proj is not None:
            g = self.decay().log_decay(self.decay_proj(x))
            g = F.pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
        o, board = gated_delta_rule(
            q.unflatten(-1, (H, self.key_dim)).repeat_interleave(n, dim=1),
            steps(k, H, self.key_dim),
            steps(v, H, self.value_dim),
            g,
            steps(self.beta_proj(x), H),
            normalize=True,
            beta_max=self.beta_max,
            initial_state=board,
            output_final_state=board is not None,
            cu_seqlens=None if seqs is None else Sequences(tuple(n * length for length in seqs.lengths)),
        )
        return o[:, n - 1 :: n], board
