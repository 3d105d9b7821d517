"""The native CPU kernels behind the linear operators, as `torch.library` custom operators.

The kernels themselves are in `csrc/`; `docs/kernels.md` tells what they compute. Here their arguments are brought
into the form that they take, their results are allocated, and autograd and torch.compile are told about them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from intarsia.ops import cpu_common, native
from intarsia.ops.arguments import Arguments
from intarsia.ops.cpu_common import Optional, compute_dtype, detached, differentiable_once, edges_of, rows


def refuse(call: Arguments) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    return cpu_common.refuse("q", call.q)


def cpu(call: Arguments) -> tuple[Tensor, Tensor | None]:
    """Run a linear operator natively and return `o` in v's dtype and the state in the compute dtype."""
    dtype = call.compute_dtype
    gate = call.gate
    tensors = [
        rows(call.q),
        rows(call.k),
        rows(call.v),
        None if call.g is None else rows(_readable(call.g, dtype)),
        None if call.beta is None else _readable(call.beta, dtype),
        None if gate is None else gate.A_log.to(dtype).contiguous(),
        None if gate is None or gate.dt_bias is None else gate.dt_bias.to(dtype).contiguous(),
        None if call.initial_state is None else call.initial_state.to(dtype).contiguous(),
    ]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    o, final, _, _ = torch.ops.intarsia.linear_forward(
        *tensors,
        [] if call.seqs is None else list(call.seqs.lengths),
        call.scale,
        call.normalize,
        0.0 if gate is None or gate.lower_bound is None else gate.lower_bound,
        0.0 if call.beta_max is None else call.beta_max,
        call.output_final_state,
        keep,
    )
    return o, final if call.output_final_state else None


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype that kernels computing in `dtype` read: themselves, or bfloat16 where that is float32."""
    return x if x.dtype == dtype or (dtype == torch.float32 and x.dtype == torch.bfloat16) else x.to(dtype)


OptionalTensors = list[Optional]

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state,"
    " SymInt[] lengths, float scale, bool normalize, float lower_bound, float beta_max"
)
_library = torch.library.Library("intarsia", "FRAGMENT")
_library.define(
    f"linear_forward({_INPUTS}, bool output_final_state, bool keep)"
    " -> (Tensor o, Tensor final_state, Tensor z, Tensor chunk_states)"
)
_library.define(
    f"linear_backward({_INPUTS}, Tensor z, Tensor chunk_states, Tensor d_o, Tensor? d_final_state) -> Tensor[]"
)


def _outputs(
    q: Tensor, v: Tensor, beta: Optional, lengths: list[int], output_final_state: bool, chunks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results of the forward pass; what is not asked for is empty."""
    dtype = compute_dtype(q)
    sequences = len(lengths) or q.shape[0]
    state = (v.shape[2], q.shape[3], v.shape[3])
    keeps_z = beta is not None and chunks
    return (
        v.new_empty(v.shape),
        q.new_empty((sequences, *state) if output_final_state else (0,), dtype=dtype),
        v.new_empty(v.shape if keeps_z else (0,), dtype=dtype),
        q.new_empty((chunks, *state) if chunks else (0,), dtype=dtype),
    )


@torch.library.impl(_library, "linear_forward", "CPU")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional,
    beta: Optional,
    A_log: Optional,
    dt_bias: Optional,
    initial_state: Optional,
    lengths: list[int],
    scale: float,
    normalize: bool,
    lower_bound: float,
    beta_max: float,
    output_final_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = native.native()
    edges = edges_of(lengths)
    count = kernels.chunk_count(edges, q.shape[0], q.shape[1]) if keep else 0
    o, final, z, chunk_states = _outputs(q, v, beta, lengths, output_final_state, count)
    kernels.linear_forward(
        *detached((q, k, v, g, beta, A_log, dt_bias, initial_state)),
        edges,
        scale,
        normalize,
        A_log is not None,
        lower_bound,
        beta_max,
        o,
        final if output_final_state else None,
        z if z.numel() else None,
        chunk_states if count else None,
        native.instruction_set(),
        torch.get_num_threads(),
    )
    return o, final, z, chunk_states


@torch.library.register_fake("intarsia::linear_forward", lib=_library)
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional,
    beta: Optional,
    A_log: Optional,
    dt_bias: Optional,
    initial_state: Optional,
    lengths: list[int],
    scale: float,
    normalize: bool,
    lower_bound: float,
    beta_max: float,
    output_final_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = 0
    if keep:
        count = sum(-(-n // CHUNK) for n in lengths) if lengths else q.shape[0] * -(-q.shape[1] // CHUNK)
    return _outputs(q, v, beta, lengths, output_final_state, count)


CHUNK = 64
"""As in csrc/linear_task.h. For the backward pass the state before each chunk is kept."""


def _gradient_room(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional,
    beta: Optional,
    A_log: Optional,
    dt_bias: Optional,
    lengths: list[int],
) -> OptionalTensors:
    """Room for the gradients as the kernels give them: of each value head, token and sequence."""
    dtype = compute_dtype(q)
    B, T, HV = v.shape[:3]
    K = q.shape[3]
    shared = q.shape[2] != HV
    sequences = len(lengths) or B
    keys = q.new_empty((B, T, HV, K), dtype=dtype if shared else q.dtype)
    return [
        keys,
        torch.empty_like(keys),
        v.new_empty(v.shape),
        None if g is None else g.new_empty((B, T, HV) if g.dim() == 1 else g.shape),
        None if beta is None else beta.new_empty(beta.shape),
        None if A_log is None else q.new_empty((sequences, HV), dtype=dtype),
        None if dt_bias is None else q.new_empty((sequences, HV, dt_bias.numel() // HV), dtype=dtype),
        q.new_empty((sequences, HV, K, v.shape[3]), dtype=dtype),
    ]


def _summed(room: OptionalTensors, q: Tensor, k: Tensor, g: Optional) -> list[Tensor]:
    """The gradients in the shapes of the inputs; what there is no input for is empty."""
    d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial = room
    assert d_q is not None
    assert d_k is not None
    groups = (q.shape[2], d_q.shape[2] // q.shape[2])
    if groups[1] > 1:
        d_q, d_k = (x.unflatten(2, groups).sum(3).to(q.dtype) for x in (d_q, d_k))
    if d_g is not None and g is not None and g.dim() == 1:
        d_g = d_g.sum((0, 1))
    results = [
        d_q,
        d_k,
        d_v,
        d_g,
        d_beta,
        None if d_A_log is None else d_A_log.sum(0),
        None if d_dt_bias is None else d_dt_bias.sum(0).flatten(),
        d_initial,
    ]
    return [q.new_empty(0) if x is None else x for x in results]


@torch.library.impl(_library, "linear_backward", "CPU")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional,
    beta: Optional,
    A_log: Optional,
    dt_bias: Optional,
    initial_state: Optional,
    lengths: list[int],
    scale: float,
    normalize: bool,
    lower_bound: float,
    beta_max: float,
    z: Tensor,
    chunk_states: Tensor,
    d_o: Tensor,
    d_final_state: Optional,
) -> list[Tensor]:
    room = _gradient_room(q, k, v, g, beta, A_log, dt_bias, lengths)
    d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial = room
    native.native().linear_backward(
        *detached((q, k, v, g, beta, A_log, dt_bias, initial_state)),
        edges_of(lengths),
        scale,
        normalize,
        A_log is not None,
        lower_bound,
        beta_max,
        *detached((z if z.numel() else None, chunk_states, rows(d_o))),
        None if d_final_state is None else d_final_state.detach().contiguous(),
        d_q,
        d_k,
        d_v,
        d_g,
        d_beta,
        d_initial,
        d_A_log,
        d_dt_bias,
        native.instruction_set(),
        torch.get_num_threads(),
    )
    return _summed(room, q, k, g)


@torch.library.register_fake("intarsia::linear_backward", lib=_library)
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Optional,
    beta: Optional,
    A_log: Optional,
    dt_bias: Optional,
    initial_state: Optional,
    lengths: list[int],
    scale: float,
    normalize: bool,
    lower_bound: float,
    beta_max: float,
    z: Tensor,
    chunk_states: Tensor,
    d_o: Tensor,
    d_final_state: Optional,
) -> list[Tensor]:
    return _summed(_gradient_room(q, k, v, g, beta, A_log, dt_bias, lengths), q, k, g)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.settings, ctx.final = inputs[8:13], inputs[13]
    ctx.given = [x is not None for x in inputs[:8]]
    _, _, z, chunk_states = output
    ctx.save_for_backward(*(x for x in inputs[:8] if x is not None), z, chunk_states)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_o: Optional, d_final: Optional, *_: Any) -> tuple[Optional, ...]:
    *saved, z, chunk_states = ctx.saved_tensors
    given = iter(saved)
    tensors: list[Any] = [next(given) if there else None for there in ctx.given]
    if d_o is None:
        d_o = torch.zeros_like(tensors[2])
    grads = torch.ops.intarsia.linear_backward(
        *tensors, *ctx.settings, z, chunk_states, d_o, d_final if ctx.final else None
    )
    return (*(grad if there else None for grad, there in zip(grads, ctx.given, strict=True)), *[None] * 7)


torch.library.register_autograd(
    "intarsia::linear_forward", _differentiate, setup_context=_setup_context, lib=_library
)
differentiable_once(_library, "intarsia::linear_backward", "the linear operators")


@register_flop_formula(torch.ops.intarsia.linear_forward)
def _forward_flops(q: Any, k: Any, v: Any, g: Any, beta: Any, *_: Any, **__: Any) -> int:
    """For `torch.utils.flop_counter`: the Kimi Linear report's equation 13, without what erasing costs where
    nothing is erased."""
    B, T, HV, V = v
    K = q[3]
    if beta is None:
        return B * T * HV * (4 * K * V + CHUNK * (K + V))
    return B * T * HV * (6 * K * V + CHUNK * (2 * K + V) + CHUNK * CHUNK)


@register_flop_formula(torch.ops.intarsia.linear_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    """Two products for each of the forward pass."""
    return 2 * _forward_flops(*shapes)
