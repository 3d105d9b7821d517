"""A few tokens behind a state: the decode step computes them, many times faster than a chunk of 64 would.

Layers that were made ready for inference with a step of their own leave nothing to this; all others decode through it.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.decode_call import FEW, StepForm, StepRows
from intarsia.ops.decode_cpu import NativeStep
from intarsia.ops.linear_call import Decay, LinearCall, Rule
from intarsia.ops.native_operator import DTYPES
from intarsia.ops.pools import InSlots, Slots, StatePool
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import apart_from_torch

Many = Callable[[LinearCall], tuple[Tensor, Tensor | None]]


def few_tokens(call: LinearCall, many: Many) -> tuple[Tensor, Tensor] | None:
    """`o` and the final state of a call with few tokens and a state, or None where the chunks must serve it.

    Of packed sequences those with few tokens come here and the rest go to `many`, so that what a sequence gives does
    not depend on the others.
    """
    state = call.initial_state
    if state is None or not (call.output_final_state and is_apart(call, state)):
        return None
    if call.seqs is None:
        return None if call.q.shape[1] > FEW else _step_through(call)
    few = [n for n, length in enumerate(call.seqs.lengths) if length <= FEW]
    if not few:
        return None
    if len(few) == call.seqs.count:
        return _step_through(call)
    rest = [n for n, length in enumerate(call.seqs.lengths) if length > FEW]
    o, final = torch.empty_like(call.v), torch.empty_like(state, dtype=call.compute_dtype)
    starts, lengths = call.seqs.starts, call.seqs.lengths
    for numbers in (few, rest):
        rows = torch.cat([torch.arange(starts[n], starts[n] + lengths[n]) for n in numbers])
        part = _of_sequences(call, state, numbers, rows)
        outputs, after = many(part) if numbers is rest else _step_through(part)
        assert after is not None
        # What is made ready here, a gate or unit keys, is not rounded to the inputs' dtype; outputs are.
        o[:, rows], final[numbers] = outputs.to(o.dtype), after
    return o, final


def few_in_slots(call: LinearCall, held: InSlots) -> Tensor | None:
    """`o` of a call all of whose sequences have few tokens, with their states where they are held, read once and
    written once; None of other calls."""
    lengths = call.lengths
    if held.pool is None or max(lengths) > FEW or not is_apart(call, held.room):
        return None
    v_dtype, call = call.v.dtype, call.of_one_dtype()
    if held.room.dtype != call.compute_dtype:
        return None
    return _stepped(call, held.pool, held.pool, held.places.slots(lengths)).to(v_dtype)


def is_apart(call: LinearCall, state: Tensor | None) -> bool:
    """Whether PyTorch need not see a call behind this state."""
    gate = () if call.gate is None else (call.gate.A_log, call.gate.dt_bias)
    return apart_from_torch(call.q, call.k, call.v, call.g, call.beta, call.a, call.b, state, *gate)


def _of_sequences(call: LinearCall, state: Tensor, numbers: list[int], rows: Tensor) -> LinearCall:
    """The call for some of its packed sequences, whose tokens are these rows."""
    assert call.seqs is not None
    return replace(
        call,
        q=call.q[:, rows],
        k=call.k[:, rows],
        v=call.v[:, rows],
        g=call.g if call.g is None or call.decay == "fixed" else call.g[:, rows],
        beta=None if call.beta is None else call.beta[:, rows],
        a=None if call.a is None else call.a[:, rows],
        b=None if call.b is None else call.b[:, rows],
        initial_state=state[numbers],
        seqs=Sequences(tuple(call.seqs.lengths[n] for n in numbers)),
    )


def _step_through(call: LinearCall) -> tuple[Tensor, Tensor]:
    state = call.initial_state
    assert state is not None
    pool = StatePool(state.detach().to(call.compute_dtype).contiguous(), None)
    following = pool.new_like()
    lengths = call.lengths
    if not all(lengths):
        idle = [n for n, length in enumerate(lengths) if not length]
        following.board[idle] = pool.board[idle]
    if not any(lengths):
        return call.v.new_empty(call.v.shape), following.board
    return _stepped(call, pool, following, _slots(lengths)), following.board


def _stepped(call: LinearCall, pool: StatePool, into: StatePool, slots: Slots) -> Tensor:
    """The outputs of the sequences in these slots; their states are written to `into`."""
    if call.gate is not None:
        call = call.plain()
    (B, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    form = (H, K, HV, V, call.decay, call.rule, call.scale, call.normalize, call.beta_max)
    step = _step(native.instruction_set(), *form)
    g, beta = (None if x is None else _readable(x, call.compute_dtype) for x in (call.g, call.beta))
    rows = StepRows(
        torch.cat([x.detach().reshape(B * T, -1) for x in (call.q, call.k, call.v)], dim=-1),
        g if g is None or call.decay == "fixed" else g.reshape(B * T, -1),
        None if beta is None else beta.reshape(B * T, HV),
        None,
        None,
        pool,
        into,
        slots,
        *(
            None if x is None else _of_heads(x, HV, call.compute_dtype).view(B * T, -1)
            for x in (call.a, call.b)
        ),
    )
    o = step.attempt(*rows)
    if o is None:  # a tensor with gaps, or one that autograd has marked
        o = step.run(rows)
    return o.view(B, T, HV, V)


def _of_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, heads, K]` in a dtype that the kernels read."""
    x = _readable(x.detach(), dtype)
    return (x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)).contiguous()


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype in DTYPES else x.to(dtype)


@functools.lru_cache(maxsize=64)
def _step(
    isa: str,
    heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
    decay: Decay,
    rule: Rule,
    scale: float,
    normalize: bool,
    beta_max: float | None,
) -> NativeStep:
    """The rule alone, without weights: one step for each instruction set serves all layers of a form."""
    form = StepForm(
        heads=heads, key_dim=key_dim, value_heads=value_heads, value_dim=value_dim, decay=decay,
        erases=rule == "delta", general=rule == "general",
        scale=scale, normalize=normalize, beta_max=beta_max,
    )  # fmt: skip
    return NativeStep(form)


# The kernels' objects must go before the interpreter does.
atexit.register(_step.cache_clear)


@functools.lru_cache(maxsize=64)
def _slots(lengths: tuple[int, ...]) -> Slots:
    """The slots of the sequences that bring tokens, each in that of its own number."""
    occupied = [n for n, length in enumerate(lengths) if length]
    return Slots(occupied, lengths=[lengths[n] for n in occupied])
