"""The chunkwise form in plain PyTorch: products of matrices instead of one token at a time.

Inside a chunk of C tokens the delta rule is a triangular system (the WY / UT form: Yang et al. 2024,
arXiv:2406.06484; with decay: the Kimi Linear report, section 3):

    N[i, j] = beta_i (k_i · k_j decayed from j to i)          for j < i
    u = (I + N)^-1 beta v       w = (I + N)^-1 beta (k decayed from the chunk's start)
    written = u - w S                                           what each token really writes
    o = (q decayed from the start) S + [q_i · k_j decayed from j to i]_{j <= i} written
    S' = (decay of the whole chunk) S + (k decayed to the end)ᵀ written

The additive rule is the same with `written = v`. The general rule erases along `a` what `b` reads before the decay:

    A, B[i, j] = b_i · a_j, b_i · k_j, decayed from j to the token before i      for j < i
    e = (I + A)^-1 (B v + (b decayed from the chunk's start) S)                  what each token reads
    o = (q decayed from the start) S + [q_i · k_j decayed]_{j <= i} v - [q_i · a_j decayed]_{j <= i} e
    S' = (decay of the whole chunk) S + (k decayed to the end)ᵀ v - (a decayed to the end)ᵀ e

How the decay between tokens is computed, for any decay at all, is told in `decay.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.ops.chunk_layout import ChunkLayout
from intarsia.ops.decay import Row, scores
from intarsia.ops.finite import spoiled
from intarsia.ops.linear_call import LinearCall, Rule
from intarsia.ops.spoiled import without_later
from intarsia.ops.tracing import sizes
from intarsia.ops.triangular import unit_lower_inverse

CHUNK = 64
"""Tokens in a chunk; a power of two."""

SEGMENT_ELEMENTS = {"cpu": 1 << 17}
"""How many elements of k are worked on at once, by kind of device: few enough for a CPU's cache. It bounds the
memory of the intermediates."""
DEFAULT_SEGMENT_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Chunks:
    """What chunks of C tokens do to the board `S` `[K, V]` that they find; `M` chunks side by side.

        written = value - erased S
        o = reads S + found written + o_besides
        S' = total S + columnsᵀ written + S_besides

    `value` `[M, HV, C, V]`; `reads`, `columns` and `erased` (None: nothing is erased) `[M, HV, C, K]`; `found`
    `[M, HV, C, C]`; `total` broadcastable to `[M, HV, K, 1]`, or None without decay. The last two, `[M, HV, C, V]`
    and `[M, HV, K, V]`, do not depend on S; None for zero.
    """

    value: Tensor
    erased: Tensor | None
    reads: Tensor
    found: Tensor
    columns: Tensor
    total: Tensor | None
    o_besides: Tensor | None = None
    S_besides: Tensor | None = None


def chunked(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """Run a linear operator chunk by chunk and return `o` in v's dtype and the state in the compute dtype."""
    o, final = _by_chunks(call)
    if spoiled(o):
        o = without_later(call, o, lambda other: _by_chunks(other)[0])
    return o, final


def _by_chunks(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """The same, but what is infinite or NaN reaches the earlier tokens of its chunk."""
    dtype = call.compute_dtype
    (B, T, _, K), HV = sizes(call.q), sizes(call.v)[2]
    layout = ChunkLayout.of(B, T, call.seqs, CHUNK)
    segment = SEGMENT_ELEMENTS.get(call.q.device.type, DEFAULT_SEGMENT_ELEMENTS)
    segments = _segments(layout.active, max(1, segment // (HV * layout.size * K)))

    if call.initial_state is None:
        S = torch.zeros(call.state_shape, dtype=dtype, device=call.q.device)
    else:
        S = call.initial_state.to(dtype)
        S = S[list(layout.order)] if layout.packed else S
    g = call.g.expand(call.v.shape[:3]) if call.g is not None and call.decay == "fixed" else call.g
    finals: list[Tensor] = []
    outputs = []
    given = {"q": call.q, "k": call.k, "v": call.v, "g": g, "beta": call.beta, "a": call.a, "b": call.b}
    parts = {name: layout.split(x, segments) for name, x in given.items() if x is not None}
    for n, steps in enumerate(segments):
        part = {name: x[n].to(dtype) for name, x in parts.items()}
        for name in ("q", "k", "a", "b"):
            if name in part and part[name].shape[1] < HV:
                part[name] = part[name].repeat_interleave(HV // part[name].shape[1], dim=1)
        part["q"] = part["q"] * call.scale
        alpha = part.pop("g").exp() if "g" in part else None
        o, S, done = _scan(RULES[call.rule](**part, alpha=alpha), S, layout.active[steps])
        outputs.append(o.to(call.v.dtype))
        finals += done
    o = layout.join(outputs, segments, T)
    if not call.output_final_state:
        return o, None
    if not layout.packed:
        return o, S
    # States end in groups, the shortest sequences first; put them back in the order they came in.
    final = torch.cat([S, *reversed(finals)])
    place = torch.empty(len(layout.order), dtype=torch.long)
    place[list(layout.order)] = torch.arange(len(layout.order))
    return o, final[place.to(final.device)]


def _segments(active: tuple[int, ...], chunks_at_once: int) -> list[slice]:
    """Runs of steps with about as many chunks together."""
    segments, start, chunks = [], 0, 0
    for step, count in enumerate(active):
        chunks += count
        if chunks >= chunks_at_once or step == len(active) - 1:
            segments.append(slice(start, step + 1))
            start, chunks = step + 1, 0
    return segments


def _additive(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None) -> Chunks:
    """q, k `[M, HV, C, K]`; v `[M, HV, C, V]`; decay factors `alpha` in [0, 1]: None, `[M, HV, C]` or
    `[M, HV, C, K]`."""
    x = scores([Row(q, "written")], [k], alpha)
    ((qk,),), (q_start,), (k_end,) = x.between, x.starts, x.ends
    return Chunks(v, None, q_start, qk, k_end, x.total)


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor | None) -> Chunks:
    """As `_additive`; `beta` `[M, HV, C]`."""
    x = scores([Row(q, "written"), Row(k, "decayed")], [k], alpha)
    ((qk,), (kk,)), (q_start, k_start), (k_end,) = x.between, x.starts, x.ends
    inverse = unit_lower_inverse(beta[..., None] * kk)
    value, erased = _apply(inverse * beta[..., None, :], v, k_start)
    return Chunks(value, erased, q_start, qk, k_end, x.total)


def _general(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, alpha: Tensor | None) -> Chunks:
    """As `_additive`; `a`, `b` `[M, HV, C, K]`. Written along `a` is what `b` reads, negative; v is beside it."""
    x = scores([Row(q, "written"), Row(b, "before")], [k, a], alpha)
    ((qk, qa), (bk, ba)), (q_start, b_start), (k_end, a_end) = x.between, x.starts, x.ends
    value, erased = _apply(unit_lower_inverse(ba), -(bk @ v), b_start)
    return Chunks(value, erased, q_start, qa, a_end, x.total, qk @ v, k_end.mT @ v)


RULES: dict[Rule, Callable[..., Chunks]] = {"additive": _additive, "delta": _delta, "general": _general}


def _apply(matrix: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix @ x` and `matrix @ y`, in one product."""
    x, y = (matrix @ torch.cat([x, y], dim=-1)).split([x.shape[-1], y.shape[-1]], dim=-1)
    return x, y


def _scan(chunks: Chunks, S: Tensor, active: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Carry the state over the steps of a segment.

    Returns the outputs `[M, HV, C, V]`, the states that go on, and those of the sequences that ended on the
    way (in the order in which they ended).
    """
    states, written, finals = [], [], []

    # Split once instead of sliced step by step: the gradient of a slice is as large as the whole.
    def by_step(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(active) if x is None else x.split(active)

    for write, columns, erased, total, besides in zip(
        chunks.value.split(active),
        chunks.columns.mT.split(active),
        by_step(chunks.erased),
        by_step(chunks.total),
        by_step(chunks.S_besides),
        strict=True,
    ):
        if write.shape[0] < S.shape[0]:
            S, ended = S.split([write.shape[0], S.shape[0] - write.shape[0]])
            finals.append(ended)
        states.append(S)
        if erased is not None:
            write = write - erased @ S
        written.append(write)
        S = (S if total is None else total * S) + columns @ write
        if besides is not None:
            S = S + besides
    o = chunks.reads @ torch.cat(states) + chunks.found @ torch.cat(written)
    return o if chunks.o_besides is None else o + chunks.o_besides, S, finals
