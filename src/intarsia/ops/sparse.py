"""Sparse attention: an indexer scores, a selector picks, and attention reads what was picked and nothing else.

    picked_i = the best blocks by I_i,b = sum_h w_ih relu(q_ih · k_b scale)        (the lightning indexer)
    o_i = sum_{j in picked_i, j <= i} softmax_j(q_i k_jᵀ scale) v_j

As in softmax attention the queries of each sequence are the last of the tokens that its keys are of: one signature for
whole sequences, packed ones, pieces of a text and single tokens behind caches in tensors or in pages. What is picked is
a tensor of numbers, so that one choice serves several layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from intarsia.ops.indexer_loss_call import indexer_loss_call
from intarsia.ops.keys import Keys
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import indexer_call, sparse_call, sparse_latent_call
from intarsia.ops.table import run


def lightning_indexer(
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
    impl: str = "auto",
) -> Tensor:
    """The `count` tokens, or blocks of tokens, that each query scores best (DeepSeek-V3.2, 2025, arXiv:2512.02556):
    `sum_h weights_h relu(q_h · k scale)`. Of equal scores the earlier wins. No gradient comes through a choice.

    Scores are float32 (float64 where an input is). All pairs are scored, a block of queries at a time: time grows with
    T · S / block, memory with T and S.

    Args:
        q: `[B, T, H, K]`, the index queries.
        k: `[B, S, K]`, one index key for all heads; or of several sequences as the keys of `softmax_attention`. With a
            `block` one for each of its complete blocks.
        weights: `[B, T, H]`.
        count: how many are picked; where fewer can be seen, all of them.
        block: how many tokens a key stands for. It can be picked when a query sees its last token; the tokens behind
            the last complete block are picked always, as a block of their own.
        relu: whether negative products count as nothing.
        scale: `K ** -0.5` by default.
        tokens: how many tokens each sequence has; by default those of its complete blocks.
        cu_seqlens: as in `softmax_attention`. Packed keys without a past have no blocks.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T, 1, n]` int32, n = count or the most keys that there are, and with blocks one more: the numbers of what
        was picked in its own sequence, rising, with -1 behind them where there are fewer.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = indexer_call(
        q, k, weights, count=count, block=block, relu=relu, scale=scale, tokens=tokens, cu_seqlens=cu_seqlens
    )
    picked: Tensor = run("lightning_indexer", call, impl)
    return picked


def sparse_attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    picked: Tensor,
    *,
    block: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q kᵀ scale) v` over the keys that each query picked, up to its own token.

    Args:
        q, k, v, scale, cu_seqlens: as in `softmax_attention`.
        picked: `[B, T, G, n]`, int32 or int64: numbers of blocks of a query's own sequence, each once, for G groups
            of query heads (G divides H, and goes with the key heads: one divides the other). -1 picks nothing and
            stands behind the others. A query that picks nothing gets zeros.
        block: the tokens of a block; block b has the tokens from `b · block` on.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T, H, V]` in the dtype of q.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = sparse_call(q, k, v, picked, block=block, scale=scale, cu_seqlens=cu_seqlens)
    o: Tensor = run("sparse_attention", call, impl)
    return o


def sparse_latent_attention(
    q: Tensor,
    latents: Keys,
    up: Tensor,
    picked: Tensor,
    *,
    block: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """`sparse_attention` to latents from which each head's keys and values would be made (MLA); they are never made.

    Args:
        q, latents, up, scale, cu_seqlens: as in `latent_attention`.
        picked, block, impl: as in `sparse_attention`.

    Returns:
        `[B, T, H, V]` in the dtype of q. Errors as `sparse_attention`.
    """
    call = sparse_latent_call(q, latents, up, picked, block=block, scale=scale, cu_seqlens=cu_seqlens)
    o: Tensor = run("sparse_latent_attention", call, impl)
    return o


def indexer_loss(
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
    impl: str = "auto",
) -> Tensor:
    """How far the scores of an indexer are from what attention gives the tokens (DeepSeek-V3.2): of each query
    `KL(p || softmax(I))`, p the weights of attention, summed over the heads and divided by their number.

    It is what an indexer is trained by: over everything that a query sees to begin with, and over what it picked once
    attention is sparse. With a `block` p is of the complete blocks that a query sees: the largest share of a token of
    each, divided by their sum; a query that sees none has no loss. p is a constant: of the arguments the first three
    alone have gradients. A block of queries is worked on at a time, and again in the backward pass.

    Args:
        index_q, index_k, index_weights: of the indexer, `[B, T, HI, D]`, `[B, T, D]` and `[B, T, HI]`; with a `block`
            the keys of complete blocks `[B, T // block, D]`, of packed sequences one behind the other.
        q, k: of attention, `[B, T, H, K]` and `[B, T, HKV, K]`, H a multiple of HKV.
        picked: `[B, T, 1, n]`, of `lightning_indexer`; None for everything.
        block, relu, index_scale: as in `lightning_indexer`.
        scale, cu_seqlens: as in `softmax_attention`.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T]` float32 (float64 where one of the indexer's is).

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = indexer_loss_call(
        index_q, index_k, index_weights, q, k, picked, block=block, relu=relu, index_scale=index_scale, scale=scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    loss: Tensor = run("indexer_loss", call, impl)
    return loss
