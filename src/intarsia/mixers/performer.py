"""Performer: softmax attention by positive orthogonal random features (Choromanski et al. 2020, arXiv:2009.14794)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.normalized import normalized_attention
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, positive
from intarsia.ops import Sequences
from intarsia.ops.precision import widen, without_autocast

LARGEST_EXPONENT = 60.0
"""Of a key's feature: e^60 is 1e26, so that the sums over any number of tokens stay far from float32's 3e38."""


@dataclass(frozen=True)
class PerformerConfig(HeadsConfig):
    """The options of Performer: `num_heads` heads of `head_dim` query-key and `head_v_dim` (V; the same by
    default) value channels, and `num_features` (K) random features, which are drawn from `seed` plus the number
    of the layer. `eps` is added to every feature, as in the authors' code."""

    type: ClassVar[str] = "performer"
    about = About(
        title="Performer",
        year=2020,
        source="arXiv:2009.14794",
        family="additive",
        equation="S_t = S_{t-1} + f(k_t) v_t^T,  E f(q)^T f(k) = exp(q^T k)",
        brought="an unbiased estimate of softmax attention with positive weights, in linear time",
        operator="linear_attention",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_features: int = 256
    seed: int = 0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_features=self.num_features, eps=self.eps)
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative; got {self.seed}")

    def at_layer(self, layer: int, depth: int) -> PerformerConfig:
        """Each layer has features of its own."""
        return dataclasses.replace(self, seed=self.seed + layer)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Performer:
        return Performer(d_model, self)


class Performer(KeepsFloat32, Mixer[RecurrentState]):
    """Performer with FAVOR+, causal:

        f(x)_m = exp(w_m · x' - |x'|² / 2) + eps        x' = x / d^(1/4)        w_m orthogonal Gaussian
        y = W_o (sum_{j <= t} f(q_t) · f(k_j) v_j / sum_{j <= t} f(q_t) · f(k_j))

    so that `f(q) · f(k)` is on average `exp(q · k / sqrt(d))` (lemma 1 of the paper).

    Differences from the authors' code:
    * Queries are stabilised as there, by their own largest exponent, which the quotient cancels. Keys are
      not divided by the largest of all tokens, which lets the future in. They need it not: with the term
      `-|x'|² / 2` a key's features are one on average. Their exponent is capped at 60, which it can only
      exceed where a feature is longer than 11 (its largest value is half the feature's length squared).
    * The divisor gets no epsilon of its own: with `eps` in every feature it cannot vanish.
    * The features stay as they were drawn (the paper also studies drawing them anew from time to time) and
      serve all heads of a layer. They are no part of a checkpoint, as the seed gives them: they are drawn again
      whenever weights are loaded or the layer leaves the meta device.
    """

    float32_names = ("features",)
    features: Tensor

    def __init__(self, d_model: int, config: PerformerConfig) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.o_proj = nn.Linear(H * V, d_model, bias=False)
        self.register_buffer("features", torch.empty(config.num_features, K), persistent=False)
        self.reset_parameters()

    def init_own_buffers(self) -> None:
        """The features `[num_features, head_dim]`, drawn in float64 on the CPU and rounded to float32."""
        drawn = orthogonal_features(self.config.num_features, self.config.head_dim, self.config.seed)
        self.features.copy_(drawn.float())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # After `to_empty` from one device to the same they hold anything.
        super()._load_from_state_dict(*args, **kwargs)
        if not self.features.is_meta:
            with torch.no_grad():
                self.init_own_buffers()

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        heads = (self.config.num_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        exponent = self._exponents(q)
        f_q = (exponent - exponent.amax(-1, keepdim=True)).exp() + self.config.eps
        f_k = self._exponents(k).clamp(max=LARGEST_EXPONENT).exp() + self.config.eps
        o, board = normalized_attention(f_q, f_k, v, state, seqs, scale=1 / self.config.num_features, eps=0.0)
        return self.o_proj(o.flatten(-2)), following(state, x, seqs, board)

    def _exponents(self, x: Tensor) -> Tensor:
        """`w_m · x' - |x'|² / 2` in the compute dtype: `[B, T, H, head_dim]` to `[B, T, H, num_features]`."""
        x = widen(x) * self.config.head_dim**-0.25
        with without_autocast(x):
            return x @ self.features.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory(
            (c.num_heads, c.num_features, c.value_dim + 1)
        )  # the divisor is the last column

    def mixing_flops(self, length: int) -> float:
        features = 4 * self.config.num_heads * self.features.numel()
        return additive_rule_flops(*self.memory.board) + features


def orthogonal_features(count: int, dim: int, seed: int) -> Tensor:
    """`[count, dim]`, float64: directions orthogonal within each block of `dim`, lengths those of Gaussian vectors."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    q, r = torch.linalg.qr(normal(-(-count // dim), dim, dim))
    # With the signs of R's diagonal the factorisation is unique, and Q uniform over the rotations.
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT.flatten(0, 1)[:count]
    return rows * normal(count, dim).norm(dim=-1, keepdim=True)
