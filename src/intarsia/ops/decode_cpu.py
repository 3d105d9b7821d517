"""The decode step by the native CPU kernels; they are in `csrc/decode*`."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops import native, native_operator
from intarsia.ops.decode_call import StepCall, StepForm, StepRows
from intarsia.ops.native_operator import DTYPES
from intarsia.ops.pools import Slots, StatePool
from intarsia.ops.tracing import observed


def refuse(call: StepCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    for x in call.tensors:
        if x is not None and (x.device.type != "cpu" or x.dtype not in DTYPES):
            return f"they take float32, float64 and bfloat16 on the CPU; got {x.dtype} on {x.device}"
    if (missing := native.missing_reason()) is not None:
        return missing
    weights = () if call.form is None else _weights(call.form)
    if observed() or not all(_is_plain(x) for x in (*weights, *call.tensors)):
        return "they take plain tensors and plain weights on the CPU, not traced ones"
    return None


class NativeStep:
    """The kernels' own object, with copies of the weights. The board is read once and written once."""

    def __init__(self, form: StepForm) -> None:
        gate = form.gate
        rate, bias, conv_weight, norm_weight = (
            None if x is None else x.detach().double().contiguous() for x in _weights(form)
        )
        bound = None if gate is None else gate.lower_bound
        self._values = form.values
        self._kernels = native.native().DecodeStep(
            H=form.heads,
            HV=form.value_heads,
            K=form.key_dim,
            V=form.value_dim,
            scale=form.scale,
            erases=form.erases,
            normalize=form.normalize,
            general=form.general,
            decay=("none", "head", "channel").index("head" if form.decay == "fixed" else form.decay),
            fixed=form.decay == "fixed",
            gate=0 if gate is None else 1 if bound is None else 2,
            bound=bound or 0.0,
            beta_scale=form.beta_max or 0.0,
            rate=None if rate is None else rate.exp(),
            bias=bias,
            W=0 if conv_weight is None else conv_weight.shape[1],
            silu=form.activation == "silu",
            conv_weight=None if conv_weight is None else conv_weight.mT.contiguous(),
            norm_weight=norm_weight,
            norm_eps=form.norm_eps,
            output_gate=(None, "sigmoid", "swish").index(form.norm_gate),
            isa=native.instruction_set(),
        )

    def attempt(
        self,
        qkv: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        z: Tensor | None,
        out: Tensor | None,
        pool: StatePool,
        into: StatePool | None,
        slots: Slots,
        a: Tensor | None = None,
        b: Tensor | None = None,
    ) -> Tensor | None:
        o = out
        if o is None:
            o = torch.empty_like(z) if z is not None and z.dtype is qkv.dtype else self._room(qkv)
        other = (None, None) if into is None else (into.board, into.conv)
        done = self._kernels.run(
            qkv, g, beta, z, o, pool.board, pool.conv, *other, *slots.numbers, torch.get_num_threads(), a, b
        )
        return o if done else None

    def run(self, rows: StepRows) -> Tensor:
        tensors = [
            None if x is None else x.detach().contiguous() for x in (rows.qkv, rows.g, rows.beta, rows.z)
        ]
        general = [None if x is None else x.detach().contiguous() for x in (rows.a, rows.b)]
        states = [
            None if x is None else x.detach()
            for x in (rows.pool.board, rows.pool.conv, rows.into.board, rows.into.conv)
        ]
        o = self._room(rows.qkv)  # `out` may have gaps
        if not self._kernels.run(
            *tensors, o, *states, *rows.slots.numbers, torch.get_num_threads(), *general
        ):
            raise UnsupportedError("the native decode step cannot read these tensors")
        return o if rows.out is None else rows.out.copy_(o)

    def _room(self, qkv: Tensor) -> Tensor:
        return qkv.new_empty((qkv.shape[0], self._values))


def _weights(form: StepForm) -> tuple[Tensor | None, ...]:
    gate = form.gate
    return (
        *((None, None) if gate is None else (gate.A_log, gate.dt_bias)),
        form.conv_weight,
        form.norm_weight,
    )


def _is_plain(x: Tensor | None) -> bool:
    """Whether it is memory on the CPU and nothing else."""
    return x is None or (type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu")


def _make(call: StepCall) -> NativeStep:
    assert call.form is not None
    return NativeStep(call.form)


IMPLEMENTATION = native_operator.implementation(_make, refuse, fused=True)
