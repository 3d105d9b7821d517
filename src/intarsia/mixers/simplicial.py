"""2-simplicial attention: softmax over pairs of tokens (Clift et al. 2019, arXiv:1909.00668; Roy et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ShapeError
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState, each_sequence, laid_out
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences
from intarsia.ops.blockwise import Blockwise, recomputed
from intarsia.ops.finite import attended
from intarsia.ops.precision import widen, without_autocast

MOST_PAIRS = 1 << 20
"""A token looks at no more pairs than that: 1024 tokens without windows, or windows whose product it is."""

MOST_NUMBERS = 1 << 22
"""So many logits are made at a time, where one token's pairs are not more already."""

NAMES = ("keys", "values", "second_keys", "second_values")


@dataclass(frozen=True)
class SimplicialConfig(MixerConfig):
    """The options of 2-simplicial attention: `num_heads` heads of `head_dim`.

    A token looks at the pairs (j, k) of the last `window1` tokens j and the last `window2` tokens k, itself
    included; None: all of them, which is cubic in the length and fit for small ones only. `bias` adds 1 / K to
    the second keys and 1 to the second values, as the authors' kernels do: with small weights the layer is then
    ordinary attention, whose logits are 1 / K of their size.
    """

    type: ClassVar[str] = "simplicial"
    about = About(
        title="2-simplicial attention",
        year=2025,
        source="arXiv:2507.02754",
        family="softmax",
        equation="o_t = sum_jk softmax_jk(sum_c q_tc k_jc k'_kc / sqrt(K)) v_j * v'_k",
        brought="a token looks at pairs of tokens, so that one layer composes two facts",
        operator="simplicial_attention",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_heads: int
    head_dim: int
    window1: int | None = 512
    window2: int | None = 32
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim, window1=self.window1, window2=self.window2)

    @property
    def kept(self) -> int | None:
        """How many tokens one looks at, itself included; None: all."""
        if self.window1 is None or self.window2 is None:
            return None
        return max(self.window1, self.window2)

    def pairs(self, length: int) -> float:
        """The pairs that a token of a sequence of `length` looks at, on average."""
        first, second = self.window1 or length, self.window2 or length
        growing = min(max(first, second), length)
        total = (length - growing) * first * second
        narrow, wide = sorted((min(first, growing), min(second, growing)))
        # sum of min(i, narrow) min(i, wide) over i = 1 .. growing, where growing = wide
        total += narrow * (narrow + 1) * (2 * narrow + 1) // 6
        total += narrow * (wide * (wide + 1) - narrow * (narrow + 1)) // 2
        return total / length

    def build(self, d_model: int, norm_eps: float = 1e-5) -> SimplicialAttention:
        return SimplicialAttention(d_model, self)


def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    *,
    window1: int | None,
    window2: int | None,
    scale: float,
) -> Tensor:
    """`o_i = sum_jk softmax_jk(scale sum_c q_ic k1_jc k2_kc) v1_j * v2_k`, i - window1 < j <= i, i - window2 < k <= i.

    A block of queries at a time, each query with its own windows of keys: memory is bounded by `MOST_NUMBERS` logits,
    or by the pairs of one query and all heads.

    Args:
        q: `[B, T, H, K]`, the last T of S tokens.
        k1, v1, k2, v2: `[B, S, H, K]`.

    Returns:
        `[B, T, H, K]` in the dtype of q; computed in float32 (float64 for float64).

    Raises:
        ShapeError: a query would look at more than `MOST_PAIRS` pairs.
    """
    B, H, S = q.shape[0], q.shape[2], k1.shape[1]
    w1, w2 = min(window1 or S, S), min(window2 or S, S)
    if w1 * w2 > MOST_PAIRS:
        raise ShapeError(
            f"2-simplicial attention would look at {w1} x {w2} pairs for a token, and {MOST_PAIRS} are the most:"
            f" set window1 and window2 (here {window1} and {window2}), or take fewer than {S} tokens"
        )
    if B > 1 and B * H * w1 * w2 > MOST_NUMBERS:
        rows_of_batch = zip(*(x.split(1) for x in (q, k1, v1, k2, v2)), strict=True)
        alone = (
            simplicial_attention(*row, window1=window1, window2=window2, scale=scale) for row in rows_of_batch
        )
        return torch.cat(list(alone))

    def attend(k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return _in_blocks(q, k1, v1, k2, v2, w1, w2, scale)

    return attended(attend, [k1, k2], [v1, v2], queries=q, windows=[w1, w2, w1, w2])


def _in_blocks(
    q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, scale: float
) -> Tensor:
    (B, T, H, K), S = q.shape, k1.shape[1]
    rows = max(1, min(64, MOST_NUMBERS // (B * H * max(w1 * w2, K * (w1 + w2)))))
    dtype = q.dtype
    q, k1, v1, k2, v2 = (widen(x) for x in (q, k1, v1, k2, v2))
    outputs = []
    with without_autocast(q):
        for start in range(0, T, rows):
            n = min(rows, T - start)
            first, last = S - T + start, S - T + start + n
            a, b = min(w1, last), min(w2, last)
            tensors = [_reach(x, first, last, a) for x in (k1, v1)] + [
                _reach(x, first, last, b) for x in (k2, v2)
            ]
            outputs.append(recomputed(_of_block, q[:, start : start + n], *tensors, a, b, first, scale))
    return torch.cat(outputs, dim=1).to(dtype)


def _reach(x: Tensor, first: int, last: int, window: int) -> Tensor:
    """The tokens that the queries `first .. last - 1` can look at, zeros for those before the beginning."""
    begin = first - window + 1
    return F.pad(x[:, max(begin, 0) : last], (0, 0, 0, 0, max(-begin, 0), 0))


def _of_block(
    q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, a: int, b: int, first: int, scale: float
) -> Tensor:
    """Queries `[B, n, H, K]` from token `first` on, with what they reach in windows of a and b tokens."""
    k1, v1 = (x.unfold(1, a, 1) for x in (k1, v1))  # [B, n, H, K, a]
    k2, v2 = (x.unfold(1, b, 1) for x in (k2, v2))
    logits = (scale * q[..., None] * k2).mT @ k1  # [B, n, H, b, a]
    if first < max(a, b) - 1:
        token = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        outside1 = token < torch.arange(a - 1, -1, -1, device=q.device)
        outside2 = token < torch.arange(b - 1, -1, -1, device=q.device)
        outside = outside2[:, None, :, None] | outside1[:, None, None, :]
        logits = logits.masked_fill(outside, -torch.inf)
    p = logits.flatten(-2).softmax(-1).unflatten(-1, (b, a))
    return ((p @ v1.mT) * v2.mT).sum(-2)


def _attention(
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    window1: float,
    window2: float,
    scale: float,
    bias: float,
) -> Tensor:
    """Windows of 0 mean None; with `bias` 1 / K and 1 are added to the second keys and values."""
    if bias:
        k2, v2 = widen(k2) + 1 / q.shape[3], widen(v2) + 1
    windows = {"window1": int(window1) or None, "window2": int(window2) or None}
    return simplicial_attention(q, k1, v1, k2, v2, **windows, scale=scale)


_ATTENTION = Blockwise("simplicial_attention", 5, _attention, lambda x: x[0].new_empty(x[0].shape))


class SimplicialAttention(Mixer[GrowingState]):
    """`y = W_o o` with `o` of `simplicial_attention`; two keys and two values of each token (section 4 of the paper).

    No positions, as in the paper's trilinear form (its section 5 offers determinants that rotary positions fit). Every
    query head has keys of its own; the paper's models share them among 64. The state keeps what the next token
    can look at.
    """

    def __init__(self, d_model: int, config: SimplicialConfig) -> None:
        super().__init__(d_model)
        self.config = config
        channels = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(d_model, channels, bias=False)
        self.k_proj = nn.Linear(d_model, channels, bias=False)
        self.v_proj = nn.Linear(d_model, channels, bias=False)
        self.k2_proj = nn.Linear(d_model, channels, bias=False)
        self.v2_proj = nn.Linear(d_model, channels, bias=False)
        self.o_proj = nn.Linear(channels, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GrowingState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, GrowingState | None]:
        self.check_input(x, state, seqs)
        heads = (self.config.num_heads, self.config.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj, self.k2_proj, self.v2_proj)
        q, *others = (proj(x).unflatten(-1, heads) for proj in projections)
        c = self.config
        windows = (c.window1 or 0, c.window2 or 0)
        if state is None:
            o = _ATTENTION(seqs, (q, *others), *windows, c.head_dim**-0.5, float(c.bias))
            return self.o_proj(o.flatten(-2)), None

        def attend(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
            return _attention(q, k1, v1, k2, v2, *windows, c.head_dim**-0.5, float(c.bias))

        grown = state.grow(x, seqs)
        held = grown.append(**dict(zip(NAMES, others, strict=True)))
        o = laid_out(each_sequence(attend, seqs, (q,), held), seqs)
        return self.o_proj(o.flatten(-2)), grown.end()

    @property
    def memory(self) -> GrowingMemory:
        """Two keys and two values of each token that the last one can look at."""
        heads = Entry((self.config.num_heads, self.config.head_dim))
        return GrowingMemory("growing", dict.fromkeys(NAMES, heads), window=self.config.kept)

    def mixing_flops(self, length: int) -> float:
        return 4 * self.config.num_heads * self.config.head_dim * self.config.pairs(length)
