"""The chunkwise form in plain PyTorch: products of matrices instead of one token at a time.

Inside a chunk of C tokens the delta rule is a triangular system (the WY / UT form: Yang et al. 2024,
arXiv:2406.06484; with decay: the Kimi Linear report, section 3):

    N[i, j] = beta_i (k_i · k_j decayed from j to i)          for j < i
    u = (I + N)^-1 beta v       w = (I + N)^-1 beta (k decayed from the chunk's start)
    written = u - w S                                           what each token really writes
    o = (q decayed from the start) S + [q_i · k_j decayed from j to i]_{j <= i} written
    S' = (decay of the whole chunk) S + (k decayed to the end)ᵀ written

The additive rule is the same with `written = v`.

How the decay between tokens is computed, for any decay at all, is told in `decay.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.ops.arguments import Arguments
from intarsia.ops.chunk_layout import ChunkLayout
from intarsia.ops.decay import channel_scores, decay_matrix
from intarsia.ops.triangular import unit_lower_inverse

CHUNK = 64
"""Tokens in a chunk; a power of two."""

SEGMENT_ELEMENTS = {"cpu": 1 << 17}
"""How many elements of k are worked on at once, by kind of device: few enough for a CPU's cache. It bounds the
memory of the intermediates."""
DEFAULT_SEGMENT_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Scores:
    """What the tokens of each chunk mean to each other and to the state; `M` chunks of `C` tokens.

    `qk`, `kk`: `[M, HV, C, C]`; `qk` is lower triangular; of `kk` only what lies below the diagonal counts, and
    it is None where nothing is erased.
    `q_start`, `k_start`: decayed from the chunk's start; `k_end`: decayed to its end; `[M, HV, C, K]`.
    `total`: the decay of the whole chunk, broadcastable to `[M, HV, K, 1]`, or None without decay.
    """

    qk: Tensor
    kk: Tensor | None
    q_start: Tensor
    k_start: Tensor
    k_end: Tensor
    total: Tensor | None


def chunked(call: Arguments) -> tuple[Tensor, Tensor | None]:
    """Run a linear operator chunk by chunk and return `o` in v's dtype and the state in the compute dtype."""
    dtype = call.compute_dtype
    T, HV, K = call.q.shape[1], call.v.shape[2], call.k.shape[3]
    layout = ChunkLayout.of(call.q.shape[0], T, call.seqs, CHUNK)
    segment = SEGMENT_ELEMENTS.get(call.q.device.type, DEFAULT_SEGMENT_ELEMENTS)
    segments = _segments(layout.active, max(1, segment // (HV * layout.size * K)))

    def split_optional(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(segments) if x is None else layout.split(x, segments)

    if call.initial_state is None:
        S = torch.zeros(call.state_shape, dtype=dtype, device=call.q.device)
    else:
        S = call.initial_state.to(dtype)[list(layout.order)]
    g = call.g.expand(call.v.shape[:3]) if call.g is not None and call.decay == "fixed" else call.g
    finals: list[Tensor] = []
    outputs = []
    qs, ks, vs = (layout.split(x, segments) for x in (call.q, call.k, call.v))
    log_decays, betas = split_optional(g), split_optional(call.beta)
    for steps, q, k, v, log_decay, beta in zip(segments, qs, ks, vs, log_decays, betas, strict=True):
        repeats = HV // q.shape[1]
        if repeats > 1:
            q, k = q.repeat_interleave(repeats, dim=1), k.repeat_interleave(repeats, dim=1)
        scores = _scores(
            q.to(dtype) * call.scale,
            k.to(dtype),
            None if log_decay is None else log_decay.to(dtype).exp(),
            erases=beta is not None,
        )
        value, erased = _writes(scores, v.to(dtype), None if beta is None else beta.to(dtype))
        o, S, done = _scan(scores, value, erased, S, layout.active[steps])
        outputs.append(o.to(call.v.dtype))
        finals += done
    o = layout.join(outputs, segments, T)
    if not call.output_final_state:
        return o, None
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


def _writes(scores: Scores, v: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`u` and `w`: what the tokens would write onto an empty state, and what of the state they take back."""
    if beta is None:
        return v, None
    assert scores.kk is not None
    inverse = unit_lower_inverse(beta[..., None] * scores.kk)
    u, w = (inverse * beta[..., None, :] @ torch.cat([v, scores.k_start], dim=-1)).split(
        [v.shape[-1], scores.k_start.shape[-1]], dim=-1
    )
    return u, w


def _scan(
    scores: Scores, value: Tensor, erased: Tensor | None, S: Tensor, active: tuple[int, ...]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Carry the state over the steps of a segment.

    Returns the outputs `[M, HV, C, V]`, the states that go on, and those of the sequences that ended on the
    way (in the order in which they ended).
    """
    states, written, finals = [], [], []
    # Split once instead of sliced step by step: the gradient of a slice is as large as the whole.
    values = value.split(active)
    eraseds = [None] * len(active) if erased is None else erased.split(active)
    totals = [None] * len(active) if scores.total is None else scores.total.split(active)
    for write, erase, k_end, total in zip(
        values, eraseds, scores.k_end.mT.split(active), totals, strict=True
    ):
        if write.shape[0] < S.shape[0]:
            S, ended = S.split([write.shape[0], S.shape[0] - write.shape[0]])
            finals.append(ended)
        states.append(S)
        if erase is not None:
            write = write - erase @ S
        written.append(write)
        S = (S if total is None else total * S) + k_end @ write
    o = scores.q_start @ torch.cat(states) + scores.qk @ torch.cat(written)
    return o, S, finals


def _scores(q: Tensor, k: Tensor, alpha: Tensor | None, erases: bool) -> Scores:
    """Scores of chunks from q, k `[M, HV, C, K]` and the decay factors `alpha` in [0, 1], None, `[M, HV, C]`
    or `[M, HV, C, K]`."""
    if alpha is None or alpha.dim() == 3:
        qk, kk = q @ k.mT, k @ k.mT if erases else None
        if alpha is None:
            return Scores(qk.tril(), kk, q, k, k, None)
        from_start, to_end, between = decay_matrix(alpha)
        return Scores(
            qk * between,
            None if kk is None else kk * between,
            q * from_start[..., None],
            k * from_start[..., None],
            k * to_end[..., None],
            from_start[..., -1, None, None],
        )
    qk, kk, q_start, k_start, k_end, total = channel_scores(q, k, alpha)
    return Scores(qk, kk if erases else None, q_start, k_start, k_end, total[..., None])
