"""A few tokens behind a state: the decode step computes them, many times faster than a chunk of 64 would.

Layers with a step of their own (`DeltaMixer`) leave nothing to this; all others decode through it.
"""

from __future__ import annotations

import atexit
import functools

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.arguments import Arguments, Decay
from intarsia.ops.cpu_common import apart_from_torch
from intarsia.ops.decode import DecodeStep
from intarsia.ops.pools import Slots, StatePool

FEW = 32
"""Up to so many tokens of a sequence the decode step is faster than a chunk."""


def few_tokens(call: Arguments) -> tuple[Tensor, Tensor] | None:
    """`o` and the final state of a call with few tokens and a state, or None where the chunks must serve it."""
    state, gate = call.initial_state, call.gate
    if state is None or not (
        call.q.shape[1] <= FEW
        and call.output_final_state
        and call.seqs is None
        and apart_from_torch(
            call.q, call.k, call.v, call.g, call.beta, state, *((gate.A_log, gate.dt_bias) if gate else ())
        )
    ):
        return None
    if call.gate is not None:
        call = call.plain()
    (B, T, H, K), (HV, V) = call.q.shape, call.v.shape[2:]
    form = (H, K, HV, V, call.decay, call.rule == "delta", call.scale, call.normalize, call.beta_max)
    step = _step(native.instruction_set(), *form)
    pool = StatePool(state.detach().to(call.compute_dtype).contiguous(), None)
    following = pool.new_like()
    g, beta = call.g, call.beta
    o = step(
        torch.cat([x.detach().reshape(B * T, -1) for x in (call.q, call.k, call.v)], dim=-1),
        pool,
        _rows(B, T),
        g=g if g is None or call.decay == "fixed" else g.reshape(B * T, -1),
        beta=None if beta is None else beta.reshape(B * T, HV),
        into=following,
    )
    return o.view(B, T, HV, V), following.board


@functools.lru_cache(maxsize=64)
def _step(
    isa: str,
    heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
    decay: Decay,
    erases: bool,
    scale: float,
    normalize: bool,
    beta_max: float | None,
) -> DecodeStep:
    """The rule alone, without weights: one step for each instruction set serves all layers of a form."""
    return DecodeStep(
        heads=heads,
        key_dim=key_dim,
        value_heads=value_heads,
        value_dim=value_dim,
        decay=decay,
        erases=erases,
        scale=scale,
        normalize=normalize,
        beta_max=beta_max,
    )


# The kernels' objects must go before the interpreter does.
atexit.register(_step.cache_clear)


@functools.lru_cache(maxsize=64)
def _rows(batch: int, length: int) -> Slots:
    return Slots.of_rows(batch, length)
