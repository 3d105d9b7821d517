"""The additive rule: gated linear attention, Mamba-2's decay, RetNet, Lightning Attention, linear attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.integrations.fla.common import (
    Result,
    of_channels,
    of_heads,
    older_keywords,
    refuse,
    run,
)
from intarsia.ops import cumulative_log_gate
from intarsia.ops.precision import widen, without_autocast


def _retention_decay(q: Tensor) -> Tensor:
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(q.shape[2], dtype=torch.float32, device=q.device)))


def _lightning_decay(q: Tensor, layer: int, layers: int) -> Tensor:
    H = q.shape[2]
    return torch.arange(H, dtype=torch.float32, device=q.device) * (-8 / H * (1 - layer / layers))


@older_keywords()
def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """Gated linear attention (`fla.ops.gla`): the additive rule with a decay `g` `[B, T, H, K]` of each channel."""
    of_channels("g", g)
    return run(
        q, k, v, g, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, gv: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """Gated linear attention (`fla.ops.gla`), `gk` `[B, T, H, K]`; `reverse` runs from the last token."""
    refuse(gv=gv)
    of_channels("gk", gk)
    return run(
        q, k, v, gk, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        reverse=reverse, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """The additive rule with a decay of each head (`fla.ops.simple_gla`; Mamba-2).

    `g` is `[B, T, H]`, of each token; `g_gamma` `[H]` is the same for all tokens. Without either nothing decays.
    """
    return run(
        q, k, v, of_heads("g", g, g_gamma), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_simple_gla`; `reverse` runs from the last token to the first."""
    return run(
        q, k, v, of_heads("g", g, g_gamma), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """RetNet (`fla.ops.retention`): head h of every token decays by `1 - 2 ** (-5 - h)`."""
    return run(
        q, k, v, _retention_decay(q), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, reverse: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_retention`; `reverse` runs from the last token to the first."""
    return run(
        q, k, v, _retention_decay(q), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """Lightning Attention (`fla.ops.lightning_attn`): head h of H of layer i of L has the log-decay
    `-8 h / H * (1 - i / L)`."""
    return run(
        q, k, v, _lightning_decay(q, layer_idx, num_layers), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_lightning_attn`; `reverse` runs from the last token to the first."""
    return run(
        q, k, v, _lightning_decay(q, layer_idx, num_layers), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None, output_final_state: bool = False,
    normalize: bool = True, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Linear attention (`fla.ops.linear_attn`): the additive rule without decay.

    With `normalize` each output is divided by `q · z`, z the sum of the keys so far, and the state is a pair: that
    of the rule (None unless `output_final_state`) and z `[N, 1, H, K]`. The queries and keys should have been
    through a positive feature map; nothing keeps `q · z` from 0 else.
    """
    return fused_recurrent_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize=normalize, cu_seqlens=cu_seqlens
    )


@older_keywords()
def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None, output_final_state: bool = False,
    reverse: bool = False, normalize: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """As `chunk_linear_attn`, but not normalised by default; `reverse` runs from the last token to the first."""
    state, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if not normalize:
        if isinstance(initial_state, tuple):
            raise ConfigError("initial_state is a pair only with normalize=True; give the state alone")
        return run(
            q, k, v, None, scale=scale, initial_state=state, output_final_state=output_final_state,
            reverse=reverse, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    # A column of ones among the values makes one column of the state the sum of the keys, and one of the
    # outputs the normaliser. Neither may be rounded before the division.
    values = F.pad(widen(v), (0, 1), value=1.0)
    initial = None
    if state is not None or z is not None:
        like = state if state is not None else z
        assert like is not None
        shape = (like.shape[0], v.shape[2], k.shape[3])
        left = values.new_zeros(*shape, v.shape[3]) if state is None else state
        right = values.new_zeros(*shape, 1) if z is None else z.permute(0, 2, 3, 1)
        initial = torch.cat([left.to(values.dtype), right.to(values.dtype)], dim=-1)
    o, final = run(
        widen(q), widen(k), values, None, scale=scale, initial_state=initial, output_final_state=True,
        reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    assert final is not None
    o = (o[..., :-1] / (o[..., -1:] + 1e-10)).to(v.dtype)
    return o, (
        final[..., :-1].contiguous() if output_final_state else None,
        final[..., -1:].permute(0, 3, 1, 2),
    )


@older_keywords()
def parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    output_attentions: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_simple_gla`, without states. With `output_attentions` the second result holds the scores that v is
    summed with, `[B, H, T, T]` in the dtype of q, which takes memory that grows with T squared; else it is None."""
    o, _ = chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    return o, _scores(q, k, g, scale, cu_seqlens) if output_attentions else None


@older_keywords()
def parallel_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_retention`, without states; `output_attentions` as in `parallel_simple_gla`."""
    o, _ = chunk_retention(q, k, v, scale, cu_seqlens=cu_seqlens)
    g = _retention_decay(q).expand(q.shape[:3])
    return o, _scores(q, k, g, scale, cu_seqlens) if output_attentions else None


def _scores(q: Tensor, k: Tensor, g: Tensor | None, scale: float | None, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        raise ConfigError(
            "output_attentions=True has no meaning for packed sequences; call it for each of them"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(q):
        scores = scale * torch.einsum("bthk,bshk->bhts", widen(q), widen(k))
    if g is not None:
        c = cumulative_log_gate(g).transpose(1, 2)
        scores = scores * (c[..., :, None] - c[..., None, :]).clamp(max=0).exp().to(scores.dtype)
    return scores.tril().to(q.dtype)


# Names for the same
fused_chunk_gla = chunk_gla
fused_chunk_simple_gla = chunk_simple_gla
fused_chunk_retention = chunk_retention
fused_chunk_linear_attn = chunk_linear_attn
