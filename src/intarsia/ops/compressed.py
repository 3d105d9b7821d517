"""Attention to compressed keys: each stands for the tokens of a window, and is seen from the last of them on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.ops.attention import largest_logit
from intarsia.ops.attention_call import queries_of
from intarsia.ops.compressed_call import compressed_call
from intarsia.ops.compressed_folded import Fold
from intarsia.ops.keys import Keys, entry_of, row_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run


def compressed_attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    stride: int,
    width: int | None = None,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q kᵀ scale) v` where keys and values stand for several tokens each (native sparse attention, 2025,
    arXiv:2502.11089).

    Key e is of the `width` tokens up to token `(e + 1) stride - 1`, and a query sees it if it sees the last of them. It
    is causal to the bit, and nothing is as large as queries times keys.

    Args:
        q: `[B, T, H, K]`, the last queries of their sequences.
        k, v: `[B, S, HKV, K]` and `[B, S, HKV, V]`, one of each `stride` tokens, H a multiple of HKV; or of several
            sequences as the keys of `softmax_attention`. The first `width / stride - 1` are none: too few tokens stand
            before them.
        stride, width: of the keys; width, a multiple of stride, is stride by default.
        scale: `K ** -0.5` by default.
        tokens: how many tokens each sequence has; by default those that have a key.
        cu_seqlens: as in `softmax_attention`, with keys of each sequence.
        impl: `"auto"`, `"cpu"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T, H, V]` in the dtype of q. A query that sees no key gets zeros.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = compressed_call(
        q, k, v, stride=stride, width=width, scale=scale, tokens=tokens, cu_seqlens=cu_seqlens
    )
    o: Tensor = run("compressed_attention", call, impl)
    return o


@torch.no_grad()
def largest_compressed_logit(
    q: Tensor, k: Keys, *, stride: int, width: int, scale: float, seqs: Sequences | None = None
) -> Tensor:
    """The largest `q kᵀ scale` of each head over the pairs that `compressed_attention` of whole sequences looks at,
    `[H]` float32; -inf where there are none."""
    heads, H = entry_of(k).shape[2], q.shape[2]
    largest = torch.full((H,), -torch.inf, device=q.device)
    for n, part in queries_of(q, seqs):
        fold = Fold.of(stride, width, part.shape[1], part.shape[1], stride)
        if fold.count:
            keys = row_of(k, n)[:, width // stride - 1 :]
            found = largest_logit(fold.folded(part, heads), keys, scale=scale)
            largest = largest.maximum(found.unflatten(0, (heads, stride, -1)).amax(1).flatten())
    return largest
