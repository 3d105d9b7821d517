"""DeltaNet: the delta rule without decay (Schlag, Irie, Schmidhuber 2021; Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.norm import OutputGate
from intarsia.mixers.base import About, NormedConfig, positive
from intarsia.mixers.delta import DeltaMixer
from intarsia.mixers.heads import HeadsConfig, check_output_gate
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


class DeltaNet(DeltaMixer):
    """DeltaNet: `DeltaMixer` without decay, and without an output gate unless one is asked for.

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
        norm_eps = config.own_eps(norm_eps)
        H, V = config.num_heads, config.value_dim
        super().__init__(
            d_model,
            heads=H,
            key_dim=config.head_dim,
            value_heads=H,
            value_dim=V,
            conv_size=config.conv_size,
            decay_proj=None,
            decay=None,
            output_gate=config.output_gate,
            output_gate_proj=None if config.output_gate == "none" else nn.Linear(d_model, H * V, bias=False),
            negative_eigenvalues=config.negative_eigenvalues,
            norm_eps=norm_eps,
            normalize=config.feature_map == "l2",
        )
        self.config = config

    def project(self, x: Tensor) -> Tensor:
        if self.config.feature_map == "l2":
            return super().project(x)
        return torch.cat(
            [self.features(self.q_proj(x)), self.features(self.k_proj(x)), self.v_proj(x)], dim=-1
        )

    def features(self, x: Tensor) -> Tensor:
        """elu + 1 of each head's channels, divided by their sum, in float32: `[..., H K]` to the same."""
        phi = F.elu(widen(x.unflatten(-1, (self.heads, self.key_dim)))) + 1
        # The epsilon is for a head whose numbers are all so negative that elu + 1 is zero.
        return (phi / (phi.sum(-1, keepdim=True) + 1e-6)).flatten(-2).to(x.dtype)
