"""What the exchange between tokens costs, from its dimensions: in the chunkwise linear rules, in softmax attention."""

from __future__ import annotations

CHUNK = 64
"""The tokens of a chunk for which FLOPs are stated."""


def delta_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise delta rule: the Kimi Linear report's equation 13,
    `6 d² + 3 C d + C²` a head, with `K V` for `d²` and `(2 K + V)` for `3 d`."""
    return heads * (6 * key_dim * value_dim + chunk * (2 * key_dim + value_dim) + chunk * chunk)


def dplr_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise general rule, counted as there: the state is read by two vectors and written
    along two, `8 K V` a head; four scores are made and three of them applied, `C (4 K + 3 V)`; the inverse, `C²`."""
    return heads * (8 * key_dim * value_dim + chunk * (4 * key_dim + 3 * value_dim) + chunk * chunk)


def additive_rule_flops(heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """FLOPs per token of the chunkwise additive rule, counted as there: the state is read and written,
    `4 K V` a head, and the chunk's scores are made and applied, `C (K + V)`."""
    return heads * (4 * key_dim * value_dim + chunk * (key_dim + value_dim))


def softmax_attention_flops(
    heads: int, key_dim: int, value_dim: int, length: int, window: int | None = None
) -> float:
    """FLOPs per token of a sequence: two products with each key that a token sees."""
    return 2 * heads * (key_dim + value_dim) * keys_seen(length, window)


def keys_seen(length: int, window: int | None = None) -> float:
    """The keys that a token of a sequence of `length` sees, on average: the first tokens see fewer than a window."""
    full = length if window is None else min(length, window)
    return full * (length - (full - 1) / 2) / length
