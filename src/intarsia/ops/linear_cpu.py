"""The native CPU kernels behind the linear operators, as `torch.library` custom operators.

The kernels themselves are in `csrc/`; `docs/kernels.md` tells what they compute. Here their arguments are brought
into the form that they take, their results are allocated, and autograd and torch.compile are told about them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from intarsia.ops import native, native_operator
from intarsia.ops.chunked import chunked
from intarsia.ops.gate import Gate
from intarsia.ops.linear_call import LinearCall, linear_call
from intarsia.ops.linear_few import few_in_slots, few_tokens
from intarsia.ops.native_operator import Optional, detached, edges_of, implementation, register, rows
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences


def refuse(call: LinearCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    return native_operator.refuse("q", call.q, call.shared_dtype)


def cpu(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """Run a linear operator natively and return `o` in v's dtype and the state in the compute dtype."""
    v_dtype = call.v.dtype
    o, state = _of_one_dtype(call.of_one_dtype())
    return o.to(v_dtype), state


def _of_one_dtype(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """The same where q, k and v have one dtype that the kernels read."""
    if (done := few_tokens(call, _of_one_dtype)) is not None:
        return done
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
    o, final, _, _ = _linear(
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

CHUNK = 64
"""As in csrc/linear_task.h. For the backward pass the state before each chunk is kept."""


class _Inputs(NamedTuple):
    """What both operators begin with, as `register` says it to PyTorch."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Optional
    beta: Optional
    A_log: Optional
    dt_bias: Optional
    initial_state: Optional
    lengths: list[int]
    scale: float
    normalize: bool
    lower_bound: float
    beta_max: float

    @property
    def sequences(self) -> int:
        return len(self.lengths) or self.q.shape[0]

    @property
    def chunks(self) -> int:
        """Of all sequences."""
        B, T = self.q.shape[:2]
        return sum(-(-n // CHUNK) for n in self.lengths) if self.lengths else B * -(-T // CHUNK)

    def for_kernels(self) -> tuple[Any, ...]:
        """As the kernels take them."""
        tensors: tuple[Any, ...] = self[:TENSORS]
        return (
            *detached(tensors), edges_of(self.lengths), self.scale, self.normalize, self.A_log is not None,
            self.lower_bound, self.beta_max,
        )  # fmt: skip


TENSORS = _Inputs._fields.index("lengths")
"""How many of them are tensors: these come first."""


def _outputs(x: _Inputs, output_final_state: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results of the forward pass; what is not asked for is empty."""
    dtype = compute_dtype(x.q)
    state = (x.v.shape[2], x.q.shape[3], x.v.shape[3])
    keeps_z = keep and x.beta is not None
    return (
        x.v.new_empty(x.v.shape),
        x.q.new_empty((x.sequences, *state) if output_final_state else (0,), dtype=dtype),
        x.v.new_empty(x.v.shape if keeps_z else (0,), dtype=dtype),
        x.q.new_empty((x.chunks, *state) if keep else (0,), dtype=dtype),
    )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, output_final_state, keep = arguments
    x = _Inputs(*inputs)
    o, final, z, chunk_states = room = _outputs(x, output_final_state, keep)
    native.native().linear_forward(
        *x.for_kernels(),
        o,
        final if output_final_state else None,
        z if z.numel() else None,
        chunk_states if keep else None,
        native.chunk_instruction_set(),
        torch.get_num_threads(),
    )
    return room


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, output_final_state, keep = arguments
    return _outputs(_Inputs(*inputs), output_final_state, keep)


def _gradient_room(x: _Inputs) -> OptionalTensors:
    """Room for the gradients as the kernels give them: of each value head, token and sequence."""
    dtype = compute_dtype(x.q)
    B, T, HV = x.v.shape[:3]
    K = x.q.shape[3]
    shared = x.q.shape[2] != HV
    keys = x.q.new_empty((B, T, HV, K), dtype=dtype if shared else x.q.dtype)
    return [
        keys,
        torch.empty_like(keys),
        x.v.new_empty(x.v.shape),
        None if x.g is None else x.g.new_empty((B, T, HV) if x.g.dim() == 1 else x.g.shape),
        None if x.beta is None else x.beta.new_empty(x.beta.shape),
        None if x.A_log is None else x.q.new_empty((x.sequences, HV), dtype=dtype),
        None if x.dt_bias is None else x.q.new_empty((x.sequences, HV, x.dt_bias.numel() // HV), dtype=dtype),
        None if x.initial_state is None else x.q.new_empty((x.sequences, HV, K, x.v.shape[3]), dtype=dtype),
    ]


def _summed(room: OptionalTensors, x: _Inputs) -> list[Tensor]:
    """The gradients in the shapes of the inputs; what there is no input for is empty."""
    d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial = room
    assert d_q is not None
    assert d_k is not None
    groups = (x.q.shape[2], d_q.shape[2] // x.q.shape[2])
    if groups[1] > 1:
        d_q, d_k = (d.unflatten(2, groups).sum(3).to(x.q.dtype) for d in (d_q, d_k))
    if d_g is not None and x.g is not None and x.g.dim() == 1:
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
    return [x.q.new_empty(0) if d is None else d for d in results]


def _in_torch(x: _Inputs) -> tuple[Tensor, Tensor | None]:
    """The same outputs by PyTorch's own operations, for derivatives of derivatives."""
    gate = None if x.A_log is None else Gate(x.A_log, x.dt_bias, x.lower_bound or None)
    call = linear_call(
        x.q, x.k, x.v, x.g, x.beta, scale=x.scale, initial_state=x.initial_state, output_final_state=True,
        cu_seqlens=Sequences(tuple(x.lengths)) if x.lengths else None, normalize=x.normalize, gate=gate,
        beta_max=x.beta_max or None,
    )  # fmt: skip
    return chunked(call.plain())


def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, z, chunk_states, d_o, d_final_state = arguments
    x = _Inputs(*inputs)
    room = _gradient_room(x)
    native.native().linear_backward(
        *x.for_kernels(),
        *detached((z if z.numel() else None, chunk_states, rows(d_o))),
        None if d_final_state is None else d_final_state.detach().contiguous(),
        *room,
        native.chunk_instruction_set(),
        torch.get_num_threads(),
    )
    return _summed(room, x)


def _backward_fake(*arguments: Any) -> list[Tensor]:
    x = _Inputs(*arguments[: len(_Inputs._fields)])
    return _summed(_gradient_room(x), x)


def _again(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    return _in_torch(_Inputs(*arguments))


_linear = register(
    "linear",
    "the linear operators",
    tensors=(
        "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state"
    ),
    settings="SymInt[] lengths, float scale, bool normalize, float lower_bound, float beta_max",
    wanted="bool output_final_state, bool keep",
    results="Tensor o, Tensor final_state",
    kept="Tensor z, Tensor chunk_states",
    like=2,
    run=_forward,
    fake=_fake,
    run_backward=_backward,
    fake_backward=_backward_fake,
    again=_again,
)


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


IMPLEMENTATION = replace(implementation(cpu, refuse), in_slots=few_in_slots)
