"""Mamba: a linear recurrence whose step size, input and output depend on the token (Gu and Dao 2023,
arXiv:2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from intarsia.mixers.base import About
from intarsia.mixers.mamba_block import MambaBlock, MambaBlockConfig


@dataclass(frozen=True)
class MambaConfig(MambaBlockConfig):
    """The options of Mamba; the defaults are the paper's."""

    type: ClassVar[str] = "mamba"
    about = About(
        title="Mamba (selective state space)",
        year=2023,
        source="arXiv:2312.00752",
        family="additive",
        equation="S_t = exp(dt_t A) * S_{t-1} + dt_t x_t k_t    (each channel a state)",
        brought="state space models whose step, input and output depend on the token: they choose what to keep",
        operator="linear_attention",
        decay="channel",
        example={"expand": 2, "state_dim": 16},
    )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Mamba:
        return Mamba(d_model, self)


class Mamba(MambaBlock):
    """Mamba's selective scan (algorithm 2, S6) in `MambaBlock`: `dt = softplus(step)`, `A = -exp(A_log)`,
    `g = dt A` of each channel and state, and `dt` also scales what is written (the authors' simplification of the
    zero-order hold, which the paper's equation 4 has exactly). k is the paper's B and q its C.

    Different from the authors' code: the two halves of their `in_proj`, and the three parts of `x_proj`, are maps of
    their own, and initial weights follow the model's policy, but for those that the paper names: `A = -(1 … N)`,
    `softplus(dt_bias)` log-uniform in [0.001, 0.1], D one and the projection of the step. There is no norm.
    """

    has_rates = True

    @staticmethod
    def write_and_decay(step: Tensor, k: Tensor, rates: Tensor | None) -> tuple[Tensor, Tensor]:
        assert rates is not None
        dt = F.softplus(step)
        return dt, dt[..., None] * rates
