"""Static sparse attention (Child et al. 2019, arXiv:1904.10509): what is read follows from where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.flops import keys_seen
from intarsia.layers.growing import Entry, GrowingMemory
from intarsia.mixers.base import About, positive
from intarsia.mixers.sparse import Asked, SparseAttention, SparseAttentionConfig
from intarsia.ops.selection import rising

Pattern = Literal["strided", "fixed"]


@dataclass(frozen=True)
class StaticSparseConfig(SparseAttentionConfig):
    """The options of grouped attention, and what is read, in blocks of `block_size` tokens: the last `local_blocks` up
    to the own one, the `sink_blocks` first, and one in every `stride_blocks` of those before.

    Counted back from the own block these are the Sparse Transformer's `"strided"` pattern. Of its `"fixed"` one they
    are the last of each `stride_blocks` from the first token on, the same for all tokens. With blocks of one token both
    are its own; with sinks and larger blocks the pattern is that of BigBird (arXiv:2007.14062) without chance.
    """

    type: ClassVar[str] = "static"
    about = About(
        title="Static sparse attention",
        year=2019,
        source="arXiv:1904.10509",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = last, first and every n-th tokens",
        brought="each token looks at the near ones and at one in so many of the others: the oldest sparse attention",
        operator="sparse_attention",
        example={"num_heads": 8, "head_dim": 128, "block_size": 64, "local_blocks": 8, "stride_blocks": 16},
    )
    block_size: int = field(kw_only=True)
    local_blocks: int = field(kw_only=True)
    stride_blocks: int = field(kw_only=True)
    sink_blocks: int = field(default=1, kw_only=True)
    pattern: Pattern = field(default="strided", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(block_size=self.block_size, local_blocks=self.local_blocks, stride_blocks=self.stride_blocks)
        if self.sink_blocks < 0:
            raise ConfigError(f"sink_blocks={self.sink_blocks} is how many first blocks are read, at least 0")
        if self.pattern not in get_args(Pattern):
            raise ConfigError(f"pattern must be 'strided' or 'fixed'; got {self.pattern!r}")

    @property
    def tokens_always(self) -> int:
        """The most tokens that are read whatever the length: the near and the first ones."""
        return (self.local_blocks + self.sink_blocks) * self.block_size

    def build(self, d_model: int, norm_eps: float = 1e-5) -> StaticSparseAttention:
        return StaticSparseAttention(d_model, self, norm_eps)


class StaticSparseAttention(SparseAttention):
    """Grouped attention to the blocks b that stand right before t's own block a, or at the beginning, or s apart:

        P_t = {b <= a : a - b < local_blocks, or b < sink_blocks, or (a - b) mod s = 0}        "strided"
        P_t = {b <= a : a - b < local_blocks, or b < sink_blocks, or b mod s = s - 1}          "fixed"
        o_t = softmax(q_t k_Pᵀ / sqrt(K)) v_P

    All heads read the same. What is read grows with the length, `stride_blocks` times slower than all there is.
    """

    config: StaticSparseConfig

    def __init__(self, d_model: int, config: StaticSparseConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.block = config.block_size

    def choose(self, asked: Asked) -> Tensor | None:
        c, longest = self.config, max(asked.past.lengths)
        if longest <= c.local_blocks * c.block_size:
            return None
        own = (asked.positions.expand(asked.x.shape[:2]) // c.block_size)[..., None]
        blocks, s = -(-longest // c.block_size), c.stride_blocks
        number = torch.arange(blocks, device=own.device)
        near = own - number[: c.local_blocks]
        apart = own - s * number[: -(-blocks // s)] if c.pattern == "strided" else number[s - 1 :: s]
        first = number[: c.sink_blocks]
        far = torch.cat([x.expand(*own.shape[:2], -1) for x in (first, apart)], dim=-1)
        # Each block once: what is near stands among the near ones, and what is first among the first.
        again = own - far < c.local_blocks
        again[..., len(first) :] |= far[..., len(first) :] < c.sink_blocks
        return rising(torch.cat([near.clamp(min=-1), far.masked_fill(again, -1)], dim=-1).to(torch.int32))[
            :, :, None
        ]

    @property
    def memory(self) -> GrowingMemory:
        """Keys and values, of which the near and the first are read, and one in every `stride_blocks` of the others."""
        c = self.config
        entry = Entry((c.kv_heads, c.head_dim), reads=c.tokens_always, every=c.stride_blocks)
        return GrowingMemory("key-value", {"keys": entry, "values": entry})

    def mixing_flops(self, length: int) -> float:
        """Two products with each key that is read: of the near ones, and of the others one in every `stride_blocks`."""
        c = self.config
        near = keys_seen(length, c.local_blocks * c.block_size)
        far = keys_seen(length) - near
        first = min(c.sink_blocks * c.block_size, far)
        return 4 * c.num_heads * c.head_dim * (near + first + (far - first) / c.stride_blocks)
