"""MiniMax sparse attention (MiniMax-M3, 2026, arXiv:2606.13392): blocks of tokens by their best index key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.flops import keys_seen
from intarsia.layers.growing import Entry
from intarsia.mixers.base import About, positive
from intarsia.mixers.indexed import IndexedAttention, IndexedConfig
from intarsia.mixers.sparse import Asked, Indexer
from intarsia.ops import blocks_loss, pick_blocks
from intarsia.ops.keys import Keys
from intarsia.ops.precision import without_autocast


@dataclass(frozen=True)
class MSAConfig(IndexedConfig):
    """The options of grouped attention, how an indexer learns, and the indexer's own, named as MiniMax-M3's are.

    `index_heads` (one per key-value head by default) query heads of `index_dim` channels, each for the query heads of
    its own group, share one key. A token reads the `index_topk_blocks` blocks of `index_block_size` tokens in which the
    best token's score is highest, the last `index_local_blocks` up to its own always among them. Queries and keys of
    the indexer have norms (of a weight around zero where `zero_centered_qk_norm` says so for attention's), and as many
    of their first channels are rotated as of attention's.
    """

    type: ClassVar[str] = "msa"
    about = About(
        title="MiniMax sparse attention",
        year=2026,
        source="arXiv:2606.13392",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = top_n blocks by max_s q'_t k'_s",
        brought="a small indexer scores tokens and each group of heads reads whole blocks of them",
        operator="sparse_attention",
        example={
            "num_heads": 8,
            "head_dim": 128,
            "num_kv_heads": 4,
            "rope": 0.5,
            "qk_norm": "head",
            "index_block_size": 128,
            "index_topk_blocks": 16,
        },
    )
    index_heads: int | None = field(default=None, kw_only=True)
    index_dim: int = field(default=128, kw_only=True)
    index_block_size: int = field(default=128, kw_only=True)
    index_topk_blocks: int = field(default=16, kw_only=True)
    index_local_blocks: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            index_heads=self.index_heads,
            index_dim=self.index_dim,
            index_block_size=self.index_block_size,
            index_topk_blocks=self.index_topk_blocks,
        )
        if not 0 <= self.index_local_blocks <= self.index_topk_blocks:
            raise ConfigError(
                f"index_local_blocks={self.index_local_blocks} are among index_topk_blocks={self.index_topk_blocks}"
            )
        if self.num_heads % self.groups or (self.groups % self.kv_heads and self.kv_heads % self.groups):
            raise ConfigError(
                f"index_heads={self.groups} must divide num_heads={self.num_heads} and go with the {self.kv_heads} "
                "key-value heads: one divides the other"
            )
        if self.index_dim < self.rotated:
            raise ConfigError(
                f"the indexer rotates the {self.rotated} channels that attention does, and has "
                f"index_dim={self.index_dim}"
            )

    @property
    def groups(self) -> int:
        """How many groups of heads pick for themselves."""
        return self.kv_heads if self.index_heads is None else self.index_heads

    def build(self, d_model: int, norm_eps: float = 1e-5) -> MiniMaxSparseAttention:
        return MiniMaxSparseAttention(d_model, self, norm_eps)


class BlockIndexer(Indexer):
    """What is compared to choose what a token reads, of group g and token s:

    I_gts = q_gt · k_s        q = rope(norm(W x))        k = rope(norm(W x))
    """

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, G, index_dim]` and keys `[B, T, 1, index_dim]`. What it is given stands apart from the
        model's gradients: no loss of the indexer reaches the model. Autocast narrows nothing that is compared."""
        with without_autocast(x):
            q, k = self.projected(x, positions)
            return q, self.rotated(self.k_norm(k).unsqueeze(2), positions)


class MiniMaxSparseAttention(IndexedAttention[tuple[Tensor, Tensor, Keys]]):
    """Grouped attention of which each group of heads reads `index_topk_blocks` blocks:

        P_gt = the best blocks b by max_{s in b, s <= t} I_gts, the last index_local_blocks up to t's own above all
        o_t = softmax(q_t k_Pᵀ / sqrt(K)) v_P

    Where no sequence has more blocks it is softmax attention, and nothing is scored.
    """

    config: MSAConfig

    def __init__(self, d_model: int, config: MSAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.block = config.index_block_size
        self.indexer = BlockIndexer(
            d_model, config.groups, config.index_dim, config, config.own_eps(norm_eps)
        )

    def index(self, asked: Asked) -> tuple[Tensor, Tensor, Keys]:
        """Queries, keys of the new tokens, and keys of all."""
        q, k = self.indexer(asked.x, asked.positions)
        keys: Keys = k
        if asked.past.grown is not None:
            (keys,) = asked.past.grown.append(index_keys=k)
        return q, k, keys

    def pick(self, index: tuple[Tensor, Tensor, Keys], asked: Asked) -> Tensor | None:
        c, (q, _, keys) = self.config, index
        if max(asked.past.lengths) <= c.index_topk_blocks * c.index_block_size:
            return None
        return pick_blocks(
            q,
            keys,
            count=c.index_topk_blocks,
            block=c.index_block_size,
            last=c.index_local_blocks,
            scale=1.0,
            cu_seqlens=asked.past.seqs,
        )

    def divergence(self, index: tuple[Tensor, Tensor, Keys], asked: Asked, picked: Tensor | None) -> Tensor:
        """Of blocks, for each group: attention's largest share of a token of each."""
        q, k, _ = index
        return blocks_loss(
            q, k[:, :, 0], asked.q, asked.k, picked, block=self.block, index_scale=1.0,
            scale=self.config.logit_scale, cu_seqlens=asked.past.seqs,
        )  # fmt: skip

    def index_entries(self) -> dict[str, Entry]:
        return {"index_keys": Entry((1, self.config.index_dim))}

    @property
    def most_read(self) -> int | None:
        return None if self.config.dense else self.config.index_topk_blocks * self.config.index_block_size

    def index_flops(self, length: int) -> float:
        """A product of each pair of tokens and group."""
        return 2 * self.config.groups * self.config.index_dim * keys_seen(length)
