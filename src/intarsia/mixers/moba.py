"""Mixture of block attention (Lu et al. 2025, arXiv:2502.13189): the blocks whose mean key a query likes best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from intarsia.layers.growing import Entry, GrowingMemory
from intarsia.mixers.base import About, positive
from intarsia.mixers.sparse import Asked, SparseAttention, SparseAttentionConfig
from intarsia.ops import pick_blocks
from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class MoBAConfig(SparseAttentionConfig):
    """The options of grouped attention, and how many blocks of `block_size` tokens each head of each token reads: the
    own one and the `top_k - 1` complete ones that it scores best."""

    type: ClassVar[str] = "moba"
    about = About(
        title="Mixture of block attention",
        year=2025,
        source="arXiv:2502.13189",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = own and top blocks by q_t mean(k_b)",
        brought="each head reads the blocks whose mean key it likes best: sparse attention without a parameter",
        operator="sparse_attention",
        example={"num_heads": 8, "head_dim": 128, "block_size": 512, "top_k": 3},
    )
    block_size: int = field(kw_only=True)
    top_k: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(block_size=self.block_size, top_k=self.top_k)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> MixtureOfBlocks:
        return MixtureOfBlocks(d_model, self, norm_eps)


class MixtureOfBlocks(SparseAttention):
    """Grouped attention of which each head reads its own blocks:

        P_ht = t's own block, and the top_k - 1 best complete ones before it by q_ht · mean of the k of block b
        o_ht = softmax(q_ht k_Pᵀ / sqrt(K)) v_P

    The means are float32. Where no sequence has more than `top_k` blocks it is softmax attention.
    """

    config: MoBAConfig

    def __init__(self, d_model: int, config: MoBAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.block = config.block_size

    def choose(self, asked: Asked) -> Tensor | None:
        c = self.config
        means = asked.past.kept("means", asked.keys, c.block_size, c.block_size, _mean)
        if max(asked.past.lengths) <= self.most_read:
            return None
        return pick_blocks(
            asked.q,
            means,
            count=c.top_k,
            block=c.block_size,
            stride=c.block_size,
            tokens=asked.past.lengths,
            cu_seqlens=asked.past.seqs,
        )

    @property
    def memory(self) -> GrowingMemory:
        """Of keys and values at most what all heads that share a key head read: each its own blocks, and all of them
        the query's own one."""
        c, held = self.config, super().memory
        heads = c.num_heads // c.kv_heads
        most = (heads * (c.top_k - 1) + 1) * c.block_size
        read = {name: dataclasses.replace(held.growing[name], reads=most) for name in ("keys", "values")}
        return GrowingMemory(held.kind, {**held.growing, **read})

    def index_entries(self) -> dict[str, Entry]:
        c = self.config
        return {"means": Entry((c.kv_heads, c.head_dim), "wide", stride=c.block_size)}

    @property
    def most_read(self) -> int:
        """The tokens that a head reads at most."""
        return self.config.top_k * self.config.block_size

    def index_flops(self, length: int) -> float:
        """A product of each token and head with the mean of each block before."""
        c = self.config
        return c.num_heads * c.head_dim * length / c.block_size


def _mean(rows: Tensor, numbers: Tensor) -> Tensor:
    """`[B, m, heads, K]` of windows `[B, m, width, heads, K]`."""
    return rows.detach().to(compute_dtype(rows)).mean(2)
