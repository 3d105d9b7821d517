"""The decays of Kimi Delta Attention and of Gated DeltaNet, from their raw inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.integrations.fla.common import decay_of, gate_of


def fused_kda_gate(
    g: Tensor, A_log: Tensor | None = None, dt_bias: Tensor | None = None, lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """KDA's decay from its raw input `[..., H, K]` (`fla.ops.kda.gate`): `-exp(A_log) softplus(g + dt_bias)`, or
    `lower_bound sigmoid(exp(A_log) (g + dt_bias))`. `A_log` holds H elements, `dt_bias` H * K."""
    return decay_of(g, gate_of(g, A_log, dt_bias, lower_bound, dims=2), dims=2).to(output_dtype)


def fused_gdn_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gated DeltaNet's decay from its raw input `[..., HV]` (`fla.ops.gated_delta_rule.gate`):
    `-exp(A_log) softplus(g + dt_bias)`. `A_log` and `dt_bias` hold HV elements."""
    return decay_of(g, gate_of(g, A_log, dt_bias, None, dims=1), dims=1).to(output_dtype)
