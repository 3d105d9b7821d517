"""The selector of blocks: which blocks of tokens each query reads, by scores of keys that stand for one token or more.

The block selectors of sparse attention are choices of its arguments: MiniMax-M3's takes the largest score of a token,
MoBA that of a block's mean key, native sparse attention and InfLLM-v2 those that attention gives compressed keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from intarsia.ops.blocks_call import Pooling, Score, blocks_call
from intarsia.ops.keys import Keys
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run


def pick_blocks(
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
    impl: str = "auto",
) -> Tensor:
    """The `count` blocks of tokens that each query scores best, of each group of its heads. Of equal scores the earlier
    wins. No gradient comes through a choice. Scores are float32 (float64 where an input is); all pairs of a query and
    a key are scored, a block of queries at a time.

    Key e stands for the `width` tokens up to token `(e + 1) stride - 1` and counts for queries that see the last of
    them. A block is scored by the keys that have a token of it; one that has none which a query sees is picked only
    where that is always so.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, heads, K]`, a key of each `stride` tokens, heads a divisor of H; or of several sequences as the keys
            of `softmax_attention`. The first `width / stride - 1` are none: too few tokens stand before them.
        count: how many blocks are picked, those that always are among them.
        block: the tokens of a block, a multiple of `stride`.
        groups: of heads that pick together, by the sum of their scores; H by default, each for itself.
        stride, width: of the keys; width, a multiple of stride, is stride by default.
        score: what a head gives a key: the product `q · k scale`, or its share of the softmax over all keys seen.
        pooling: a block has the largest score of its keys, or their sum, each times the strides in common.
        first, last: so many blocks from the first on, and up to the query's own, are always picked.
        scale: `K ** -0.5` by default.
        tokens: how many tokens each sequence has; by default those that have a key.
        cu_seqlens: as in `softmax_attention`. Packed keys without a past are of one token each.
        impl: `"auto"`, `"torch"` or `"reference"`.

    Returns:
        `[B, T, groups, n]` int32, n = count or the most blocks that there are: their numbers, rising, with -1 behind
        them where there are fewer. What `sparse_attention` takes.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, or an unknown `impl`.
    """
    call = blocks_call(
        q, k, count=count, block=block, groups=groups, stride=stride, width=width, score=score, pooling=pooling,
        first=first, last=last, scale=scale, tokens=tokens, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    picked: Tensor = run("pick_blocks", call, impl)
    return picked
