"""The general rule by the native decode step: a few tokens of each sequence behind its state."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from intarsia.ops import native_operator
from intarsia.ops.chunked import chunked
from intarsia.ops.decode_call import FEW
from intarsia.ops.linear_call import LinearCall
from intarsia.ops.linear_few import few_in_slots, few_tokens, is_apart


def refuse(call: LinearCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    if call.initial_state is None and not call.in_slots:
        return "the kernels take tokens behind a state alone"
    if min(call.lengths) > FEW:
        return f"the kernels take up to {FEW} tokens of a sequence"
    if not call.in_slots and not call.output_final_state:
        return "the kernels always give the final state, which was not asked for"
    if (reason := native_operator.refuse("q", call.q, call.shared_dtype)) is not None:
        return reason
    return (
        None if is_apart(call, call.initial_state) else "the kernels have no gradients and cannot be traced"
    )


def dplr_cpu(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """The results of `dplr_rule`; packed sequences that bring more tokens go through chunks."""
    v_dtype = call.v.dtype
    done = few_tokens(call.of_one_dtype(), chunked)
    assert done is not None
    return done[0].to(v_dtype), done[1]


IMPLEMENTATION = replace(native_operator.implementation(dplr_cpu, refuse), in_slots=few_in_slots)
