"""The arguments of an indexer's loss, checked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.attention_call import sequences_in
from intarsia.ops.keys import Keys
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import IndexerCall, check_picked, indexer_call


@dataclass(frozen=True)
class IndexerLossCall:
    """The arguments of one call of the indexer's loss; `indexer_loss` says what they are."""

    index: IndexerCall
    keys: Tensor
    """The index keys `[B, T // block, K]`, of packed sequences one behind the other."""
    q: Tensor
    k: Tensor
    picked: Tensor | None
    scale: float

    @property
    def seqs(self) -> Sequences | None:
        return self.index.seqs

    @property
    def block(self) -> int:
        return self.index.block


def indexer_loss_call(
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    q: Tensor,
    k: Tensor,
    picked: Tensor | None = None,
    *,
    block: int = 1,
    relu: bool = True,
    index_scale: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> IndexerLossCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
    """
    if block < 1:
        raise ConfigError(f"block must be at least 1; got {block}")
    B, T = index_q.shape[:2]
    seqs = sequences_in(index_q, cu_seqlens)
    lengths = (T,) if seqs is None else seqs.lengths
    wanted = [B, sum(n // block for n in lengths)]
    if not isinstance(index_k, Tensor) or list(index_k.shape[:2]) != wanted:
        raise ShapeError(
            f"index_k must have a key for each query, or each complete block of {block} of its sequence: {wanted}"
        )
    apart: Keys = index_k
    if seqs is not None and block > 1:
        apart = index_k.split([n // block for n in lengths], dim=1)
    index = indexer_call(
        index_q, apart, index_weights, count=1, block=block, relu=relu, scale=index_scale,
        tokens=lengths if seqs is not None else lengths * B, cu_seqlens=seqs,
    )  # fmt: skip
    for name, x in {"q": q, "k": k}.items():
        if x.dim() != 4 or not x.is_floating_point() or x.shape[:2] != index_q.shape[:2]:
            raise ShapeError(
                f"{name} must be [B, T, heads, K], [B, T] = {list(index_q.shape[:2])}; got {list(x.shape)} {x.dtype}"
            )
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"k must have the channels of q and heads that divide its own; got {list(q.shape)} and {list(k.shape)}"
        )
    if picked is not None:
        check_picked(picked, q, block)
        if picked.shape[2] != 1:
            raise ShapeError(f"picked must be of one group, [B, T, 1, n]; got {list(picked.shape)}")
    return IndexerLossCall(index, index_k, q, k, picked, q.shape[3] ** -0.5 if scale is None else scale)
