"""The arguments of sparse attention and of its indexer, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops.attention_call import (
    AttentionCall,
    LatentCall,
    attention_call,
    latent_call,
    sequences_in,
)
from intarsia.ops.attention_recorded import Room
from intarsia.ops.keys import Keys, count_of, entry_of, lengths_of
from intarsia.ops.sequences import Sequences, placed


@dataclass(frozen=True)
class IndexerCall:
    """The arguments of one call of the lightning indexer; `lightning_indexer` says what they are."""

    q: Tensor
    k: Keys
    weights: Tensor
    count: int
    block: int
    relu: bool
    scale: float
    tokens: tuple[int, ...]
    """Of each sequence, how many the last query sees."""
    seqs: Sequences | None

    @property
    def slots(self) -> int:
        """How many numbers of blocks there are for a query."""
        return min(self.count, max(self.tokens) // self.block) + (self.block > 1)


@dataclass(frozen=True)
class SparseCall:
    """The arguments of one call of sparse attention; `sparse_attention` says what they are."""

    dense: AttentionCall
    picked: Tensor
    block: int


@dataclass(frozen=True)
class SparseLatentCall:
    """The arguments of one call of sparse latent attention; `sparse_latent_attention` says what they are."""

    dense: LatentCall
    picked: Tensor
    block: int


def indexer_call(
    q: Tensor,
    k: Keys,
    weights: Tensor,
    *,
    count: int,
    block: int = 1,
    relu: bool = True,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> IndexerCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
        ConfigError: nothing to choose, or blocks without a token.
        UnsupportedError: keys in room, of a recorded step.
    """
    refuse_room(k)
    if q.dim() != 4 or not q.is_floating_point() or min(q.shape) == 0:
        raise ShapeError(
            f"q must be [B, T, H, K], floating point, none of them 0; got {list(q.shape)} {q.dtype}"
        )
    if count < 1 or block < 1:
        raise ConfigError(f"count and block must be at least 1; got {count} and {block}")
    seqs = sequences_in(q, cu_seqlens)
    B, T, H, K = q.shape
    if weights.shape != (B, T, H) or not weights.is_floating_point():
        raise ShapeError(
            f"weights must be [B, T, H] = {[B, T, H]}; got {list(weights.shape)} {weights.dtype}"
        )
    entry = entry_of(k)
    if entry.dim() != 3 or entry.shape[-1] != K or not entry.is_floating_point():
        raise ShapeError(
            f"k must be [B, S, K] with the {K} channels of q; got {list(entry.shape)} {entry.dtype}"
        )
    if {entry.device, weights.device} != {q.device}:
        raise ShapeError(
            f"q, k and weights must be on one device; got {q.device}, {entry.device}, {weights.device}"
        )
    seen = tokens_seen(q, k, block, tokens, seqs)
    return IndexerCall(q, k, weights, count, block, relu, K**-0.5 if scale is None else scale, seen, seqs)


def sparse_call(
    q: Tensor,
    k: Keys,
    v: Keys,
    picked: Tensor,
    *,
    block: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> SparseCall:
    """Check the shapes, dtypes and devices of a call. Errors as `indexer_call`."""
    refuse_room(k)
    refuse_room(v)
    dense = attention_call(q, k, v, scale=scale, cu_seqlens=cu_seqlens)
    heads = entry_of(k).shape[2]
    check_picked(picked, q, block)
    groups = picked.shape[2]
    if q.shape[2] % groups or (groups % heads and heads % groups):
        raise ShapeError(
            f"picked must be of groups that divide the {q.shape[2]} query heads and go with the {heads} key heads; "
            f"got {list(picked.shape)}"
        )
    return SparseCall(dense, picked, block)


def sparse_latent_call(
    q: Tensor,
    latents: Keys,
    up: Tensor,
    picked: Tensor,
    *,
    block: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> SparseLatentCall:
    """Check the shapes, dtypes and devices of a call. Errors as `indexer_call`."""
    refuse_room(latents)
    dense = latent_call(q, latents, up, scale=scale, cu_seqlens=cu_seqlens)
    check_picked(picked, q, block)
    if q.shape[2] % picked.shape[2]:
        raise ShapeError(
            f"picked must be of groups that divide the {q.shape[2]} heads; got {list(picked.shape)}"
        )
    return SparseLatentCall(dense, picked, block)


def refuse_room(keys: object) -> None:
    """Raise UnsupportedError for keys of a step that is recorded: nobody knows their number then."""
    if isinstance(keys, Room):
        raise UnsupportedError(
            "a layer that chooses what it reads cannot be recorded yet: run the step unrecorded"
        )


def tokens_seen(
    q: Tensor, k: Keys, stride: int, tokens: Sequence[int] | None, seqs: Sequences | None
) -> tuple[int, ...]:
    """How many tokens the last query of each sequence sees, of which each `stride` have a key; `tokens` if it is given.

    Raises:
        ShapeError: queries, keys and tokens do not fit each other.
    """
    B, T = q.shape[:2]
    queries = (T,) * B if seqs is None else seqs.lengths
    if seqs is not None and isinstance(k, Tensor):
        if stride != 1 or k.shape[:2] != q.shape[:2]:
            raise ShapeError(
                f"packed as the queries are, k has a key for each of their tokens, [1, {T}]; got {list(k.shape)}, a "
                f"key of each {stride}"
            )
        held = queries
    else:
        held = lengths_of(k)
        if count_of(k) != len(queries):
            raise ShapeError(f"k is of {count_of(k)} sequences and q of {len(queries)}")
    seen = tuple(n * stride for n in held) if tokens is None else tuple(tokens)
    if len(seen) != len(queries):
        raise ShapeError(f"tokens is of {len(seen)} sequences and q of {len(queries)}")
    for n, (keys, there, new) in enumerate(zip(held, seen, queries, strict=True)):
        if there // stride != keys or there < new:
            raise ShapeError(
                f"sequence {n} of {there} tokens has {new} queries and {keys} keys: the queries are of the last tokens,"
                f" and each {stride} of them have a key"
            )
    return seen


def standing(
    T: int, lengths: Sequence[int], seqs: Sequences | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The number of each query's sequence and its place there, each `[B, T]` int64. The queries are of the last
    tokens of sequences of these `lengths`."""
    if seqs is None:
        ends = placed(torch.tensor(list(lengths)), device)[:, None]
        number = torch.arange(len(lengths), device=device)[:, None].expand(-1, T)
        return number, ends - T + torch.arange(T, device=device)
    before = [total - new for total, new in zip(lengths, seqs.lengths, strict=True)]
    return seqs.indices(device)[None], (seqs.positions(device) + seqs.per_token(before, device))[None]


def check_picked(picked: Tensor, q: Tensor, block: int) -> None:
    """Raise ShapeError or ConfigError unless these are numbers of blocks for the queries."""
    if block < 1:
        raise ConfigError(f"block must be at least 1; got {block}")
    if picked.dim() != 4 or picked.shape[:2] != q.shape[:2] or min(picked.shape) == 0:
        raise ShapeError(
            f"picked must be [B, T, groups, n] with [B, T] = {list(q.shape[:2])}; got {list(picked.shape)}"
        )
    if picked.dtype not in (torch.int32, torch.int64) or picked.device != q.device:
        raise ShapeError(
            f"picked must be int32 or int64 on {q.device}, as q is; got {picked.dtype} on {picked.device}"
        )
