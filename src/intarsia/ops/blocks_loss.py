"""What an indexer that picks blocks of tokens is trained by."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.blocks_loss_call import blocks_loss_call
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run


def blocks_loss(
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
    impl: str = "auto",
) -> Tensor:
    """How far the scores of blocks are from what attention gives them, of an indexer that scores a block by its best
    token, for each group of heads (MiniMax-M3): of each query the mean over groups of `KL(p || softmax(I))`, with

        I_b = max_{s in b} q'_g · k'_s        p_b ∝ max_{s in b} (the weights of attention, summed over g's heads)

    over the blocks of the tokens up to the query's, its own among them; or over those that it picked. p is a constant:
    of the arguments the first two alone have gradients. A block of queries is worked on at a time, and again in the
    backward pass.

    Args:
        index_q, index_k: of the indexer, `[B, T, G, D]` and `[B, T, D]`.
        q, k: of attention, `[B, T, H, K]` and `[B, T, HKV, K]`, H a multiple of HKV and of G.
        picked: `[B, T, G, n]`, of `pick_blocks`; None for everything.
        block: the tokens of a block.
        index_scale: `D ** -0.5` by default.
        scale, cu_seqlens: as in `softmax_attention`.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T]` float32 (float64 where one of the indexer's is).

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = blocks_loss_call(
        index_q,
        index_k,
        q,
        k,
        picked,
        block=block,
        index_scale=index_scale,
        scale=scale,
        cu_seqlens=cu_seqlens,
    )
    loss: Tensor = run("blocks_loss", call, impl)
    return loss
