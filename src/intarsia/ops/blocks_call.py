"""The arguments of the selector of blocks, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.attention_call import sequences_in
from intarsia.ops.keys import Keys, entry_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import refuse_room, tokens_seen

Score = Literal["product", "softmax"]
Pooling = Literal["max", "sum"]


@dataclass(frozen=True)
class BlocksCall:
    """The arguments of one call of the selector of blocks; `pick_blocks` says what they are."""

    q: Tensor
    k: Keys
    count: int
    block: int
    groups: int
    stride: int
    width: int
    score: Score
    pooling: Pooling
    first: int
    last: int
    scale: float
    tokens: tuple[int, ...]
    """Of each sequence, how many the last query sees."""
    seqs: Sequences | None

    @property
    def slots(self) -> int:
        """How many numbers of blocks there are for a query."""
        return min(self.count, -(-max(self.tokens) // self.block))


def blocks_call(
    q: Tensor,
    k: Keys,
    *,
    count: int,
    block: int,
    groups: int | None = None,
    stride: int = 1,
    width: int | None = None,
    score: Score = "product",
    pooling: Pooling = "max",
    first: int = 0,
    last: int = 1,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> BlocksCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
        ConfigError: numbers that do not go together.
        UnsupportedError: keys in room, of a recorded step.
    """
    refuse_room(k)
    if q.dim() != 4 or not q.is_floating_point() or min(q.shape) == 0:
        raise ShapeError(
            f"q must be [B, T, H, K], floating point, none of them 0; got {list(q.shape)} {q.dtype}"
        )
    H, K = q.shape[2:]
    width = stride if width is None else width
    groups = H if groups is None else groups
    if min(count, block, stride, width, groups) < 1 or min(first, last) < 0:
        raise ConfigError(
            f"count, block, stride, width and groups are at least 1, first and last at least 0; got {count}, {block}, "
            f"{stride}, {width}, {groups}, {first} and {last}"
        )
    if block % stride or width % stride:
        raise ConfigError(f"block={block} and width={width} must be multiples of stride={stride}")
    if first + last > count:
        raise ConfigError(f"first={first} and last={last} blocks are always picked, more than count={count}")
    if score not in get_args(Score) or pooling not in get_args(Pooling):
        raise ConfigError(
            f"score is 'product' or 'softmax' and pooling 'max' or 'sum'; got {score!r}, {pooling!r}"
        )
    entry = entry_of(k)
    if entry.dim() != 4 or entry.shape[-1] != K or not entry.is_floating_point() or H % entry.shape[2]:
        raise ShapeError(
            f"k must be [B, S, heads, K] with the {K} channels of q and heads that divide its {H}; got "
            f"{list(entry.shape)} {entry.dtype}"
        )
    if H % groups:
        raise ShapeError(f"groups={groups} must divide the {H} heads of q")
    if entry.device != q.device:
        raise ShapeError(f"q and k must be on one device; got {q.device} and {entry.device}")
    seqs = sequences_in(q, cu_seqlens)
    seen = tokens_seen(q, k, stride, tokens, seqs)
    factor = K**-0.5 if scale is None else scale
    return BlocksCall(
        q, k, count, block, groups, stride, width, score, pooling, first, last, factor, seen, seqs
    )
