"""DeltaNet: the delta rule without decay (Schlag, Irie, Schmidhuber 2021; Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.decoding import Projected, Projections, fused_step
from intarsia.layers.flops import delta_rule_flops
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, HeadsConfig, Layer, Mixer, NormedConfig, check_output_gate, positive
from intarsia.ops import Sequences, gated_delta_rule
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class DeltaNetConfig(NormedConfig, HeadsConfig):
    """The options of DeltaNet; the defaults are those of 2024.

    `head_dim` is the key dimension K, `head_v_dim` the value dimension V (K by default). `feature_map` is what is
    done to queries and keys: `"l2"` (2024: SiLU behind the convolution, then length one) or `"elu"` (2021:
    elu + 1, then sum one), which goes without a convolution. `output_gate` multiplies the norm's result.
    `negative_eigenvalues` lets beta reach 2 (Grazzi et al. 2024, arXiv:2411.12537).
    """

    type: ClassVar[str] = "deltanet"
    about = About(
        title="DeltaNet",
        year=2021,
        source="arXiv:2102.11174",
        family="delta",
        equation="S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T",
        brought="a key's old value is erased before the new one is written, so that a full memory can be corrected",
        operator="gated_delta_rule",
        example={"num_heads": 8, "head_dim": 128},
    )
    conv_size: int | None = 4
    feature_map: Literal["l2", "elu"] = "l2"
    output_gate: OutputGate = "none"
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size)
        if self.feature_map not in ("l2", "elu"):
            raise ConfigError(f"feature_map must be 'l2' or 'elu'; got {self.feature_map!r}")
        if self.feature_map == "elu" and self.conv_size is not None:
            raise ConfigError("feature_map='elu' is that of 2021, without a convolution: set conv_size=None")
        check_output_gate(self.output_gate)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> DeltaNet:
        return DeltaNet(d_model, self, norm_eps)


class DeltaNet(Mixer[RecurrentState]):
    """DeltaNet: the delta rule without decay, and without an output gate unless one is asked for.

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))
    S_t = (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        beta = sigmoid(W x)
    y = W_o rmsnorm_head(S_tᵀ q_t / sqrt(K))

    With `feature_map="l2"` the layer of Yang et al. 2024 (arXiv:2406.06484). With `"elu"` queries and keys are those
    of Schlag et al. 2021 (arXiv:2102.11174): elu + 1, divided by their sum. What stays of 2024 is the norm of each
    head, where 2021 had the residual stream's alone; under it the factor `1 / sqrt(K)` is of no consequence but for
    the norm's epsilon. Values are the projection as it is, as in 2021.

    Differences from flash-linear-attention's layer: without a convolution there is no SiLU either, which it keeps on
    q and k with `"l2"` and on v always, with elu too (where it may also have convolutions).
    """

    def __init__(self, d_model: int, config: DeltaNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n) for n in (H * K, H * K, H * V))
        self.conv = short_convolution_of(2 * H * K + H * V, config.conv_size)
        self.beta_proj = linear(d_model, H)
        self.output_gate_proj = None if config.output_gate == "none" else linear(d_model, H * V)
        self.norm = GatedNorm(V, config.own_eps(norm_eps), config.output_gate)
        self.o_proj = linear(H * V, d_model)
        self.beta_max = 2 if config.negative_eigenvalues else 1

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        qkv, _, beta, z = self.project(x)
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (H, K), (H, V))
        o, board = gated_delta_rule(
            q, k, v, None, beta, normalize=self.config.feature_map == "l2", beta_max=self.beta_max,
            **carried(state, seqs),
        )  # fmt: skip
        return self.o_proj(self.norm(o, z).flatten(-2)), following(state, x, seqs, board, inputs)

    def project(self, x: Tensor) -> Projected:
        """All that is made of each token alone, `[..., D]`."""
        q, k = self.q_proj(x), self.k_proj(x)
        if self.config.feature_map == "elu":
            q, k = self.features(q), self.features(k)
        return Projected(
            qkv=torch.cat([q, k, self.v_proj(x)], dim=-1),
            g=None,
            beta=self.beta_proj(x),
            z=None if self.output_gate_proj is None else self.output_gate_proj(x),
        )

    def features(self, x: Tensor) -> Tensor:
        """elu + 1 of each head's channels, divided by their sum, in float32: `[..., H K]` to the same."""
        phi = F.elu(widen(x.unflatten(-1, (self.config.num_heads, self.config.head_dim)))) + 1
        # The epsilon is for a head whose numbers are all so negative that elu + 1 is zero.
        return (phi / (phi.sum(-1, keepdim=True) + 1e-6)).flatten(-2).to(x.dtype)

    def for_inference(self) -> Layer[RecurrentState]:
        H, normalize = self.config.num_heads, self.config.feature_map == "l2"
        qkv = (self.q_proj, self.k_proj, self.v_proj)
        maps = Projections(qkv, None, self.beta_proj, self.output_gate_proj) if normalize else None
        step = fused_step(
            self,
            heads=H,
            decay="none",
            gate=None,
            beta_max=self.beta_max,
            normalize=normalize,
            projections=maps,
        )
        return step or self

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(*self.memory.board)
