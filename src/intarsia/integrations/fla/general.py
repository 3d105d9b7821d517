"""The general rule: DPLR and IPLR, RWKV-7, Comba, Gated DeltaNet-2.

flash-linear-attention writes the transition of the first three `Diag(exp g) + b aᵀ`: a reads and b is added. The
operator here erases along `a` what `b` reads, so its `a` is their `-b` and its `b` their `a`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.integrations.fla.common import (
    Result,
    check_safe_gate,
    decay_of,
    gate_of,
    of_channels,
    of_heads,
    older_keywords,
    refuse,
    run,
    write_strength,
)
from intarsia.ops import l2norm
from intarsia.ops.precision import widen


def _general(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, *, scale: float | None,
    initial_state: Tensor | None, output_final_state: bool, reverse: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Result:  # fmt: skip
    """The operator's general rule; `o` in `dtype`, where v is wider than what the caller gave."""
    o, state = run(
        q.to(v.dtype), k.to(v.dtype), v, g, a=a, b=b, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip
    return (o if dtype is None else o.to(dtype)), state


# DPLR, IPLR


@older_keywords()
def chunk_dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, safe_gate: bool = False, chunk_size: int | None = None,
    disable_recompute: bool = False, cp_context: object | None = None, lower_bound: float | None = None,
) -> Result:  # fmt: skip
    """The rule whose transition is diagonal plus low rank (`fla.ops.generalized_delta_rule`):
    `S_t = Diag(exp gk) S_{t-1} + b (S_{t-1}ᵀ a)ᵀ + k vᵀ`.

    `gk`, `a` and `b` are `[B, T, H, K]`. `lower_bound` promises that `gk` is not below it, and changes nothing here.
    """
    refuse(cp_context=cp_context)
    of_channels("gk", gk)
    if lower_bound is not None and lower_bound >= 0:
        raise ConfigError(f"lower_bound must be negative, for gk is; got {lower_bound}")
    return _general(
        q, k, v, -b, a, gk, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_dplr_delta_rule`; `reverse` runs from the last token to the first."""
    of_channels("gk", gk)
    return _general(
        q, k, v, -b, a, gk, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_iplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, *, chunk_size: int | None = None,
) -> Result:  # fmt: skip
    """The rule whose transition is the identity plus low rank (`fla.ops.generalized_delta_rule`):
    `S_t = S_{t-1} + b (S_{t-1}ᵀ a)ᵀ + k vᵀ`, with `a` and `b` `[B, T, H, K]`."""
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ConfigError(f"chunk_size must be a power of 2; got {chunk_size}")
    return _general(
        q, k, v, -b, a, None, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_iplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_iplr_delta_rule`."""
    return chunk_iplr_delta_rule(q, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)


# RWKV-7


@older_keywords()
def chunk_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, safe_gate: bool = False, chunk_size: int | None = None,
    disable_recompute: bool = False, cp_context: object | None = None, lower_bound: float | None = None,
) -> Result:  # fmt: skip
    """RWKV-7 (`fla.ops.rwkv7`): `chunk_dplr_delta_rule` with the receptance r for q, the log-decay w for gk, and a
    scale of 1."""
    return chunk_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu,
        cp_context=cp_context, lower_bound=lower_bound,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = True, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_rwkv7`, but by default with a scale of `K ** -0.5` and the final state, as in
    flash-linear-attention."""
    return fused_recurrent_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


@older_keywords()
def fused_mul_recurrent_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, scale: float | None = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """RWKV-7 from what its layer has (`fla.ops.rwkv7`): `S_t = Diag(exp w) S_{t-1} - (kk a) (S_{t-1}ᵀ kk)ᵀ + k vᵀ`."""
    of_channels("w", w)
    return _general(
        r, k, v, widen(kk) * widen(a), kk, w, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip


# Comba


@older_keywords()
def chunk_comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, g: Tensor, beta: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """Comba (`fla.ops.comba`): `S_t = exp(g) S_{t-1} + beta k (v - S_{t-1}ᵀ p)ᵀ`; what is erased is read before the
    board decays.

    `p` `[B, T, H, K]` is the key that reads, k by default; `g` and `beta` (1 by default) are `[B, T, HV]`.
    `use_qk_l2norm_in_kernel` divides q, k and p by their lengths.
    """
    of_heads("g", g)
    write_strength(beta)
    p = k if p is None else p
    if p.shape != k.shape:
        raise ShapeError(f"p must have the shape of k, {list(k.shape)}; got {list(p.shape)}")
    q, k, p = (l2norm(widen(x)) if use_qk_l2norm_in_kernel else widen(x) for x in (q, k, p))
    strength = widen(v.new_ones(v.shape[:3]) if beta is None else beta)[..., None]
    group = _group(k, v)
    return _general(
        q, k, strength * widen(v), strength * k.repeat_interleave(group, 2), p, g, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu, dtype=v.dtype,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_comba(
    q: Tensor, k: Tensor, p: Tensor | None, v: Tensor, g: Tensor, beta: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_comba`; p stands before v here, as in flash-linear-attention."""
    return chunk_comba(
        q, k, v, p, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


# Gated DeltaNet-2


@older_keywords(64)
def chunk_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False, lower_bound: float | None = None, disable_recompute: bool = False,
    return_intermediate_states: bool = False, state_v_first: bool = False, cp_context: object | None = None, *,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Result:  # fmt: skip
    """Gated DeltaNet-2 (`fla.ops.gdn2`): `S_t = (I - k (b k)ᵀ) Diag(exp g) S_{t-1} + k (w v)ᵀ`.

    `g` and the erasing strength `b` are `[B, T, HV, K]`, the writing strength `w` `[B, T, HV, V]`. With
    `use_gate_in_kernel` g is raw, as in `chunk_kda`.
    """
    refuse(cp_context=cp_context, return_intermediate_states=return_intermediate_states)
    check_safe_gate(safe_gate, use_gate_in_kernel, lower_bound)
    of_channels("g", g)
    channels = (*v.shape[:3], k.shape[3])
    for name, x, shape in (("g", g, channels), ("b", b, channels), ("w", w, v.shape)):
        if x.shape != shape:
            raise ShapeError(f"{name} must be {list(shape)} for k {list(k.shape)}; got {list(x.shape)}")
    if use_gate_in_kernel:
        g = decay_of(g, gate_of(g, A_log, dt_bias, lower_bound, dims=2), dims=2)
    q, k = (l2norm(widen(x)) if use_qk_l2norm_in_kernel else widen(x) for x in (q, k))
    read = widen(b) * widen(g).exp() * k.repeat_interleave(_group(k, v), 2)
    return _general(
        q, k, widen(w) * widen(v), k, read, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu, dtype=v.dtype,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    lower_bound: float | None = None, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """As `chunk_gdn2`."""
    return chunk_gdn2(
        q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        cu_seqlens, lower_bound=lower_bound, state_v_first=state_v_first, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip


def _group(k: Tensor, v: Tensor) -> int:
    """The value heads of a key head."""
    H, HV = k.shape[2], v.shape[2]
    if H == 0 or HV % H:
        raise ShapeError(f"the value heads must be a multiple of the key heads: {HV} is not one of {H}")
    return HV // H
