"""The delta rule: Kimi Delta Attention, Gated DeltaNet, DeltaNet, DeltaProduct."""

from __future__ import annotations

import torch.nn.functional as F
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
    sequences,
    write_strength,
)
from intarsia.ops import Sequences
from intarsia.ops.precision import widen


@older_keywords(32, 64)
def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    safe_gate: bool = False, lower_bound: float | None = None, disable_recompute: bool = False,
    return_intermediate_states: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, cp_context: object | None = None, use_graph: bool = False,
    max_num_seqs: int | None = None, *, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Result:  # fmt: skip
    """Kimi Delta Attention (`fla.ops.kda`): the delta rule with a decay of each channel.

    `g` is `[B, T, HV, K]`; with `use_gate_in_kernel` it is raw, and `fused_kda_gate` makes the decay of it with
    `A_log` `[HV]`, `dt_bias` `[HV * K]` and `lower_bound`. `beta` is `[B, T, HV]`, logits with
    `use_beta_sigmoid_in_kernel`, and then reaches 2 with `allow_neg_eigval`.
    """
    refuse(cp_context=cp_context, return_intermediate_states=return_intermediate_states, use_graph=use_graph)
    check_safe_gate(safe_gate, use_gate_in_kernel, lower_bound)
    of_channels("g", g)
    return run(
        q, k, v, g, gate=gate_of(g, A_log, dt_bias, lower_bound, dims=2) if use_gate_in_kernel else None,
        **write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), erase=True, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        normalize_qk=use_qk_l2norm_in_kernel, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, lower_bound: float | None = None,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """Kimi Delta Attention (`fla.ops.kda`); arguments as in `chunk_kda`."""
    return chunk_kda(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound, state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip


@older_keywords(16, 32, 64)
def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
    cp_context: object | None = None, *, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Result:  # fmt: skip
    """Gated DeltaNet (`fla.ops.gated_delta_rule`): the delta rule with a decay of each head.

    `g` is `[B, T, HV]`; with `use_gate_in_kernel` it is raw, and `fused_gdn_gate` makes the decay of it with
    `A_log` and `dt_bias`, both `[HV]`. `beta` as in `chunk_kda`.
    """
    refuse(cp_context=cp_context)
    of_heads("g", g)
    return run(
        q, k, v, g, gate=gate_of(g, A_log, dt_bias, None, dims=1) if use_gate_in_kernel else None,
        **write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), erase=True, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state,
        normalize_qk=use_qk_l2norm_in_kernel, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None,
    gv: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """Gated DeltaNet (`fla.ops.gated_delta_rule`); arguments as in `chunk_gated_delta_rule`.

    `gk` `[B, T, HV, K]` is a decay of each channel, besides `g` if both are given. `beta` None means 1.
    """
    refuse(gv=gv)
    of_heads("g", g)
    of_channels("gk", gk)
    gate = None
    if use_gate_in_kernel:
        if g is None:
            raise ConfigError("use_gate_in_kernel=True makes the decay of g; give g")
        gate = gate_of(g, A_log, dt_bias, None, dims=1)
    if gk is not None:
        if gate is not None and g is not None:
            g, gate = decay_of(g, gate, dims=1), None
        g = gk if g is None else widen(g)[..., None] + widen(gk)
    return run(
        q, k, v, g, gate=gate, **write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), erase=True,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        normalize_qk=use_qk_l2norm_in_kernel, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords(16, 32, 64)
def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """DeltaNet (`fla.ops.delta_rule`): the delta rule without decay, `beta` `[B, T, HV]`."""
    return run(
        q, k, v, None, **write_strength(beta), erase=True, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, normalize_qk=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip


@older_keywords()
def fused_recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:  # fmt: skip
    """DeltaNet (`fla.ops.delta_rule`); `beta` None means 1."""
    return run(
        q, k, v, None, **write_strength(beta), erase=True, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, normalize_qk=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@older_keywords()
def chunk_gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, num_householder: int,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, cp_context: object | None = None,
) -> Result:  # fmt: skip
    """Gated DeltaProduct (`fla.ops.gated_delta_product`): `num_householder` steps of the delta rule for each token.

    `q` is `[B, T, H, K]`; k, v and beta hold the steps of a token behind each other, `[B, T * num_householder, ...]`.
    `g` `[B, T, H]` decays before the first of them; None does not decay. `cu_seqlens` counts tokens, not steps.
    """
    refuse(cp_context=cp_context)
    of_heads("g", g)
    n, (B, T) = num_householder, q.shape[:2]
    for name, x in (("k", k), ("v", v), ("beta", beta)):
        if x.shape[:2] != (B, T * n):
            raise ShapeError(
                f"{name} must begin with [B, T * num_householder] = {[B, T * n]}; got {list(x.shape)}"
            )
    seqs = sequences(cu_seqlens, cu_seqlens_cpu)
    # A token is n tokens, of which the first alone decays and the last alone is read.
    if g is not None:
        g = F.pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
    o, state = run(
        q.repeat_interleave(n, dim=1), k, v, g, **write_strength(beta), erase=True, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, normalize_qk=use_qk_l2norm_in_kernel,
        cu_seqlens=None if seqs is None else Sequences(tuple(n * length for length in seqs.lengths)),
    )  # fmt: skip
    return o[:, n - 1 :: n], state


# Names for the same
chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
fused_chunk_delta_rule = chunk_delta_rule
