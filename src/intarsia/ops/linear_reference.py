"""The specification: one token at a time, in float64, written to be read.

    S_t = Diag(exp g_t) S_{t-1}                        decay
    S_t += beta_t k_t (v_t - S_tᵀ k_t)ᵀ                delta rule: erase along k_t, then write
    S_t += k_t v_tᵀ                                    additive rule: only write
    S_t += k_t v_tᵀ - a_t (S_{t-1}ᵀ b_t)ᵀ              general rule: erase along a_t what b_t reads, and write
    o_t = S_tᵀ q_t · scale

Written out, the delta rule is `S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ`
(Kimi Linear report, equation 1), and the general rule `S_t = (Diag(exp g_t) - a_t b_tᵀ) S_{t-1} + k_t v_tᵀ`
(section 6.2, where it is called DPLR: diagonal plus low rank). Every other implementation is tested against
this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.linear_call import LinearCall


def reference(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence in float64 and return `o` in v's dtype and the state in the compute dtype.

    A specification is exact: what layers leave to the operator (`LinearCall.plain`) is computed in float64 as well.
    """
    call, dtype = call.plain(torch.float64), call.compute_dtype
    group = call.v.shape[2] // call.q.shape[2]
    q = call.q.double().repeat_interleave(group, dim=2) * call.scale
    k = call.k.double().repeat_interleave(group, dim=2)
    v = call.v.double()
    alpha = _alpha(call)
    beta = None if call.beta is None else call.beta.double()
    a, b = (
        None if x is None else x.double().repeat_interleave(v.shape[2] // x.shape[2], dim=2)
        for x in (call.a, call.b)
    )
    if call.initial_state is None:
        states = torch.zeros(call.state_shape, dtype=torch.float64, device=q.device)
    else:
        states = call.initial_state.double()

    # A packed row is cut into its sequences; a batch is one group of sequences that run side by side.
    if call.seqs is None:
        spans = [(slice(0, call.q.shape[1]), states)]
    else:
        spans = [
            (slice(start, start + length), states[n : n + 1])
            for n, (start, length) in enumerate(zip(call.seqs.starts, call.seqs.lengths, strict=True))
        ]
    outputs, finals = [], []
    for span, S in spans:
        for t in range(span.start, span.stop):
            k_t, v_t = k[:, t], v[:, t]
            S_before = S
            if alpha is not None:
                S = alpha[:, t, :, :, None] * S
            if a is not None and b is not None:
                recalled = torch.einsum("bhkv,bhk->bhv", S_before, b[:, t])
                S = S - a[:, t, :, :, None] * recalled[..., None, :]
            if beta is not None:
                recalled = torch.einsum("bhkv,bhk->bhv", S, k_t)
                v_t = beta[:, t, :, None] * (v_t - recalled)
            S = S + k_t[..., :, None] * v_t[..., None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
        finals.append(S)
    o = torch.stack(outputs, dim=1).to(call.v.dtype)
    return o, torch.cat(finals).to(dtype) if call.output_final_state else None


def _alpha(call: LinearCall) -> Tensor | None:
    """What remains after each token's decay, broadcastable to `[B, T, HV, K]`."""
    if call.g is None:
        return None
    alpha = call.g.double().exp()
    if call.decay == "fixed":
        return alpha[None, None, :, None].expand(*call.v.shape[:3], 1)
    return alpha[..., None] if call.decay == "head" else alpha


IMPLEMENTATION = Implementation("reference", reference, automatic=False)
