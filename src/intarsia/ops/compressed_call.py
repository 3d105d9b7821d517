"""The arguments of attention to compressed keys, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.attention_call import lengths_differ, sequences_in
from intarsia.ops.keys import Keys, entry_of, lengths_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import refuse_room, tokens_seen


@dataclass(frozen=True)
class CompressedCall:
    """The arguments of one call of attention to compressed keys; `compressed_attention` says what they are."""

    q: Tensor
    k: Keys
    v: Keys
    stride: int
    width: int
    scale: float
    tokens: tuple[int, ...]
    """Of each sequence, how many the last query sees."""
    seqs: Sequences | None


def compressed_call(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    stride: int,
    width: int | None = None,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> CompressedCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
        ConfigError: numbers that do not go together.
        UnsupportedError: keys in room, of a recorded step.
    """
    refuse_room(k)
    refuse_room(v)
    if q.dim() != 4 or not q.is_floating_point() or min(q.shape) == 0:
        raise ShapeError(
            f"q must be [B, T, H, K], floating point, none of them 0; got {list(q.shape)} {q.dtype}"
        )
    width = stride if width is None else width
    if min(stride, width) < 1 or width % stride:
        raise ConfigError(f"width={width} must be a multiple of stride={stride}, and both at least 1")
    H, K = q.shape[2:]
    key, value = entry_of(k), entry_of(v)
    for name, entry in (("k", key), ("v", value)):
        if entry.dim() != 4 or not entry.is_floating_point() or entry.device != q.device:
            raise ShapeError(
                f"{name} must be [B, S, heads, dim], floating point on {q.device}, as q is; got {list(entry.shape)} "
                f"{entry.dtype} on {entry.device}"
            )
    if key.shape[3] != K or value.shape[2] != key.shape[2] or not key.shape[2] or H % key.shape[2]:
        raise ShapeError(
            f"k must have the {K} channels of q, and k and v as many heads, a divisor of its {H}; got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if lengths_differ(v, k):
        raise ShapeError(f"v must have an entry for each of k: {lengths_of(v)} and {lengths_of(k)}")
    seqs = sequences_in(q, cu_seqlens)
    seen = tokens_seen(q, k, stride, tokens, seqs)
    return CompressedCall(q, k, v, stride, width, K**-0.5 if scale is None else scale, seen, seqs)
