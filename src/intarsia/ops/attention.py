"""Softmax attention: the public operators.

    o_i = sum_{j <= i} softmax_j(q_i k_jᵀ scale) v_j

The queries of each sequence are the last of the tokens that its keys are of. So one signature serves whole sequences,
as in training; a piece of a text or one token behind cached ones; and batches of sequences of different lengths, whose
keys lie in tensors of their own or in pages. It is causal to the bit, and what is not finite reaches no earlier token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops.attention_call import attention_call, latent_call
from intarsia.ops.attention_recorded import Room, attention_in_room, latent_attention_in_room
from intarsia.ops.attention_torch import visible
from intarsia.ops.keys import Keys
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run
from intarsia.ops.uncompiled import Uncompiled


def softmax_attention(
    q: Tensor,
    k: Keys | Room,
    v: Keys | Room,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    log_gate: Keys | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q kᵀ scale) v` where each query sees the keys up to its own token.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, S, HKV, K]` and `[B, S, HKV, V]`, H a multiple of HKV: the queries are the last T of the S tokens. Of
            sequences that have different numbers of keys, a tuple of `[1, S_n, HKV, ...]` of each, or `Paged`. They may
            have another dtype than q, and are rounded to that of q.
        scale: `K ** -0.5` by default.
        window: a query sees so many keys and no more, its own among them: `i - window < j <= i`.
        sinks: `[H]`, a logit of each head that takes part in the softmax and has no value (gpt-oss): what it is
            given of the probability is lost.
        log_gate: `[B, S, H]`, or as k, the sums c of a forget gate's logarithms up to each token (float64, of
            `cumulative_log_gate`): `c_i - c_j` is added to the logits (forgetting attention).
        cu_seqlens: sequences packed into one row of queries, `B == 1`. Without keys of each sequence, k and v are
            packed alike, `S == T`. A sequence may have keys and no query.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T, H, V]` in the dtype of q.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    if isinstance(k, Room) or isinstance(v, Room):
        if not (isinstance(k, Room) and isinstance(v, Room) and log_gate is None and cu_seqlens is None):
            raise UnsupportedError(
                "a recorded step has keys and values in room, one query of each sequence, no gate"
            )
        return attention_in_room(q, k, v, scale=scale, window=window, sinks=sinks)
    call = attention_call(
        q, k, v, scale=scale, window=window, sinks=sinks, log_gate=log_gate, cu_seqlens=cu_seqlens
    )
    o: Tensor = run("softmax_attention", call, impl)
    return o


def latent_attention(
    q: Tensor,
    latents: Keys | Room,
    up: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention to latents from which each head's keys and values are made (MLA):

        k_jh = [up_h[: K - shared] c_j; s_j]        v_jh = up_h[K - shared :] c_j        latent j = [c_j; s_j]

    Few queries never make them: `q_hᵀ W_h c` is computed as `(W_hᵀ q_h)ᵀ c`.

    Args:
        q: `[B, T, H, K]`; the last `shared` channels meet the key channels that all heads share.
        latents: `[B, S, rank + shared]`, or of several sequences as the keys of `softmax_attention`.
        up: `[H, K - shared + V, rank]`, the weights that make the heads' own keys and their values.
        scale, cu_seqlens, impl: as in `softmax_attention`.

    Returns:
        `[B, T, H, V]` in the dtype of q.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError, UnsupportedError: an `impl` that there is not.
    """
    if isinstance(latents, Room):
        return latent_attention_in_room(q, latents, up, scale=scale)
    o: Tensor = run("latent_attention", latent_call(q, latents, up, scale=scale, cu_seqlens=cu_seqlens), impl)
    return o


@torch.no_grad()
def largest_logit(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    window: int | None = None,
    seqs: Sequences | None = None,
    rows: int = 256,
) -> Tensor:
    """The largest `q kᵀ scale` of each head over the pairs that causal attention looks at, `[H]` float32.

    Works on `rows` queries at a time, so that no `[T, T]` matrix is held.
    """
    lengths = (q.shape[1],) if seqs is None else seqs.lengths
    return _LARGEST((q, k), lengths, (scale, window or 0, rows))[0]


def _largest(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    q, k = tensors
    assert q is not None
    assert k is not None
    scale, window, rows = numbers[0], int(numbers[1]) or None, int(numbers[2])
    H, HKV = q.shape[2], k.shape[2]
    largest = torch.full((H,), -torch.inf, device=q.device)
    for q_n, k_n in zip(q.split(lengths, dim=1), k.split(lengths, dim=1), strict=True):
        for start in range(0, q_n.shape[1], rows):
            block = q_n[:, start : start + rows].transpose(1, 2)
            first = 0 if window is None else max(start - window + 1, 0)
            keys = k_n[:, first : start + block.shape[2]].transpose(1, 2).repeat_interleave(H // HKV, dim=1)
            logits = (block @ keys.mT).float() * scale
            hidden = ~visible(logits.shape[-2], logits.shape[-1], window, q.device)
            largest = torch.maximum(largest, logits.masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3)))
    return [largest]


_LARGEST = Uncompiled(
    "largest_logit", 2, 1, _largest,
    lambda tensors, *_: [tensors[0].new_empty(tensors[0].shape[2], dtype=torch.float32)],
)  # fmt: skip
