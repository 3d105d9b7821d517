"""The arguments of the loss of an indexer that picks blocks, checked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.attention_call import sequences_in
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import check_picked


@dataclass(frozen=True)
class BlocksLossCall:
    """The arguments of one call of the loss of an indexer of blocks; `blocks_loss` says what they are."""

    index_q: Tensor
    index_k: Tensor
    q: Tensor
    k: Tensor
    picked: Tensor | None
    block: int
    index_scale: float
    scale: float
    seqs: Sequences | None


def blocks_loss_call(
    index_q: Tensor,
    index_k: Tensor,
    q: Tensor,
    k: Tensor,
    picked: Tensor | None = None,
    *,
    block: int,
    index_scale: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> BlocksLossCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
        ConfigError: blocks without a token.
    """
    if block < 1:
        raise ConfigError(f"block must be at least 1; got {block}")
    if index_q.dim() != 4 or not index_q.is_floating_point() or min(index_q.shape) == 0:
        raise ShapeError(
            f"index_q must be [B, T, G, D], floating point, none of them 0; got {list(index_q.shape)} {index_q.dtype}"
        )
    B, T, G, D = index_q.shape
    if index_k.shape != (B, T, D) or not index_k.is_floating_point():
        raise ShapeError(
            f"index_k must be [B, T, D] = {[B, T, D]}; got {list(index_k.shape)} {index_k.dtype}"
        )
    for name, x in {"q": q, "k": k}.items():
        if x.dim() != 4 or not x.is_floating_point() or x.shape[:2] != (B, T):
            raise ShapeError(
                f"{name} must be [B, T, heads, K], [B, T] = {[B, T]}; got {list(x.shape)} {x.dtype}"
            )
    H, heads = q.shape[2], k.shape[2]
    if q.shape[3] != k.shape[3] or H % heads:
        raise ShapeError(
            f"k must have the channels of q and heads that divide its own; got {list(q.shape)} and {list(k.shape)}"
        )
    if H % G or (G % heads and heads % G):
        raise ShapeError(
            f"index_q must be of groups that divide the {H} query heads and go with the {heads} key heads; got {G}"
        )
    if picked is not None:
        check_picked(picked, q, block)
        if picked.shape[2] != G:
            raise ShapeError(f"picked must be of the {G} groups of index_q; got {list(picked.shape)}")
    return BlocksLossCall(
        index_q, index_k, q, k, picked, block, D**-0.5 if index_scale is None else index_scale,
        q.shape[3] ** -0.5 if scale is None else scale, sequences_in(index_q, cu_seqlens),
    )  # fmt: skip
