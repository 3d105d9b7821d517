"""Longhorn: each token solves a small regression exactly (Liu et al. 2024, arXiv:2407.14207)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.mixers.base import About
from intarsia.mixers.mamba_block import MambaBlock, MambaBlockConfig


@dataclass(frozen=True)
class LonghornConfig(MambaBlockConfig):
    """The options of Longhorn; the defaults are the authors' code's, which are Mamba's."""

    type: ClassVar[str] = "longhorn"
    about = About(
        title="Longhorn",
        year=2024,
        source="arXiv:2407.14207",
        family="delta",
        equation="S_t = (1 - D_t k_t^2) * S_{t-1} + D_t x_t k_t    D_t = b_t / (1 + b_t k_t.k_t)",
        brought="a decay that follows from what is written: no forget gate to parametrise",
        operator="linear_attention",
        decay="channel",
        example={"expand": 2, "state_dim": 16},
    )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Longhorn:
        return Longhorn(d_model, self)


class Longhorn(MambaBlock):
    """Longhorn's recurrence in `MambaBlock`. Each channel's state s solves, for every token,

        min_s  ||s - s_{t-1}||² + beta_t (s · k_t - x_t)²        beta = sigmoid(step)

    whose solution is the delta rule with the strength `Delta = beta / (1 + beta k·k)`; the erased `Delta k kᵀ` is
    then taken by its diagonal, as in the paper, so that a token is a decay of each channel and state and a write:

        s_t = (1 - Delta_t k_t²) * s_{t-1} + Delta_t x_t k_t

    Different from the authors' code: fused maps stand apart, as in `Mamba`, and initial weights follow the model's
    policy but for D, one, `dt_bias`, zero, and the projection of the step. There is no norm.
    """

    has_rates = False

    @staticmethod
    def write_and_decay(step: Tensor, k: Tensor, rates: Tensor | None) -> tuple[Tensor, Tensor]:
        beta = torch.sigmoid(step)
        squares = k.square()
        norm = squares.sum(-1, keepdim=True)
        whole = beta * norm
        # 1 - Delta k² = (1 + beta (k·k - k²)) / (1 + beta k·k): positive also where rounding makes Delta k² one.
        others = (norm - squares).clamp(min=0)
        g = (beta[..., None] * others[:, :, None]).log1p() - whole.log1p()[..., None]
        return beta / (1 + whole), g
