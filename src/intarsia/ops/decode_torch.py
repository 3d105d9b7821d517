"""The decode step in plain PyTorch, on any device: what the native kernels do, a token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.decode_call import StepCall, StepForm, StepRows
from intarsia.ops.norm_call import NormCall
from intarsia.ops.norm_torch import norm_in_torch, unit
from intarsia.ops.pools import NEW


class TorchStep:
    """A step that reads its weights where they are."""

    def __init__(self, call: StepCall) -> None:
        assert call.form is not None
        self._form = call.form

    def attempt(self, *_: object) -> None:
        """Nothing is done before the arguments are checked."""

    def run(self, rows: StepRows) -> Tensor:
        with torch.no_grad():
            return decode_in_torch(self._form, rows)


def decode_in_torch(step: StepForm, rows: StepRows) -> Tensor:
    """The outputs of a step; the states are updated.

    One sequence after the other: PyTorch rounds the last few numbers of a tensor differently from the rest, so
    only tensors of one shape make a sequence's numbers independent of its batch.
    """
    qkv, g, beta, z, out, pool, into, slots = rows[:8]
    o = qkv.new_empty(slots.tokens, step.values) if out is None else out
    first = 0
    for read, write, length in zip(slots.read, slots.write, slots.lengths, strict=True):
        board, past = (
            None if x is None else torch.zeros_like(x[:1]) if read == NEW else x[read : read + 1]
            for x in (pool.board, pool.conv)
        )
        assert board is not None
        for row in (slice(t, t + 1) for t in range(first, first + length)):
            x = qkv[row].to(board.dtype)
            if past is not None and step.conv_weight is not None:
                window = torch.cat([past, x[:, None]], dim=1)
                past = window[:, 1:]
                x = (window * step.conv_weight.to(x.dtype).mT).sum(1)
                x = F.silu(x) if step.activation == "silu" else x
            decay = g if g is None or step.decay == "fixed" else g[row]
            strength = None if beta is None else beta[row].to(x.dtype)
            y, board = _rule(step, x, decay, strength, board)
            o[row] = _output(step, y, None if z is None else z[row].to(x.dtype))
        into.board[write] = board[0]
        if into.conv is not None and past is not None:
            into.conv[write] = past[0]
        first += length
    return o


def _rule(
    step: StepForm, x: Tensor, g: Tensor | None, beta: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """`x` `[1, channels]`, `S` `[1, HV, K, V]`: what is read, `[1, HV, V]`, and the next S."""
    keys, heads = step.heads * step.key_dim, (step.value_heads, -1)
    q, k, v = x.split([keys, keys, x.shape[1] - 2 * keys], dim=1)
    q, k = (part.unflatten(1, (step.heads, step.key_dim)) for part in (q, k))
    if step.normalize:
        q, k = unit(q), unit(k)
    q, k = (part.repeat_interleave(step.value_heads // step.heads, dim=1) for part in (q * step.scale, k))
    v = v.unflatten(1, heads)
    if g is not None:
        channels = (step.key_dim,) if step.decay == "channel" else ()
        g = g.to(x.dtype).view(1, 1, step.value_heads, *channels)
        if step.gate is not None:
            g = step.gate.log_decay(g).to(x.dtype)
        S = S * g.exp().view(1, step.value_heads, -1, 1)
    if step.erases:
        v = v - (S * k[..., None]).sum(-2)
        if beta is not None:
            v = v * (beta if step.beta_max is None else step.beta_max * torch.sigmoid(beta))[..., None]
    S = S + k[..., None] * v[..., None, :]
    return (S * q[..., None]).sum(-2), S


def _output(step: StepForm, o: Tensor, z: Tensor | None) -> Tensor:
    """The gated RMSNorm of `[1, HV, V]`, flat."""
    if step.norm_weight is not None:
        z = None if z is None else z.view(o.shape)
        o = norm_in_torch(NormCall(o, z, step.norm_weight, step.norm_eps, step.norm_gate))
    return o.flatten(1)


IMPLEMENTATION = Implementation("torch", TorchStep)
