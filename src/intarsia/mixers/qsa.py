"""Qwen's sparse attention (Qwen3.8-Flash-Next, 2026): pools of a few tokens by the mean of their index keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.growing import Entry, GrowingMemory
from intarsia.mixers.base import About, positive
from intarsia.mixers.indexed import IndexedAttention, IndexedConfig
from intarsia.mixers.sparse import Asked, Indexer
from intarsia.ops import indexer_loss, lightning_indexer
from intarsia.ops.keys import Keys
from intarsia.ops.precision import compute_dtype, without_autocast


@dataclass(frozen=True)
class QSAConfig(IndexedConfig):
    """The options of grouped attention, how an indexer learns, and the indexer's own.

    It has `index_heads` query heads and one key, of `index_dim` channels, of which as many are rotated as of
    attention's. A token reads `index_budget` tokens in pools of `index_ratio`, and those behind the last complete pool.
    The norms of the indexer's queries and pooled keys have weights around zero where `zero_centered_qk_norm` says so
    for attention's.
    """

    type: ClassVar[str] = "qsa"
    about = About(
        title="Qwen sparse attention",
        year=2026,
        source="transformers: qwen4_exp",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = top pools by sum_h relu(q'_t,h k'_p)",
        brought="an indexer that looks at one mean key of every few tokens: a fraction to score and to keep",
        operator="sparse_attention",
        example={
            "num_heads": 8,
            "head_dim": 128,
            "num_kv_heads": 2,
            "rope": 0.25,
            "qk_norm": "head",
            "zero_centered_qk_norm": True,
            "output_gate": True,
            "index_heads": 16,
            "index_budget": 2048,
        },
    )
    index_heads: int = field(kw_only=True)
    index_dim: int = field(default=128, kw_only=True)
    index_budget: int = field(default=2048, kw_only=True)
    index_ratio: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            index_heads=self.index_heads,
            index_dim=self.index_dim,
            index_budget=self.index_budget,
            index_ratio=self.index_ratio,
        )
        if self.index_budget % self.index_ratio:
            raise ConfigError(
                f"index_budget={self.index_budget} is of pools of index_ratio={self.index_ratio} tokens"
            )
        if self.index_dim < self.rotated:
            raise ConfigError(
                f"the indexer rotates the {self.rotated} channels that attention does: index_dim={self.index_dim}"
            )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> QwenSparseAttention:
        return QwenSparseAttention(d_model, self, norm_eps)


class PoolIndexer(Indexer):
    """What is compared to choose what a token reads, of pool p:

    I_tp = sum_h relu(q_th · k_p / sqrt(index_dim))
    q = rope(norm(W x))        k_p = rope(norm(mean of W x over the tokens of p), at the first of them)
    """

    config: QSAConfig

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, H, index_dim]` and raw keys `[B, T, index_dim]`. What it is given stands apart from the
        model's gradients: no loss of the indexer reaches the model. Autocast narrows nothing that is compared."""
        with without_autocast(x):
            return self.projected(x, positions)

    def pooled(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Keys `[B, m, index_dim]` of the pools `numbers` `[m]`, of the raw keys `[B, m, index_ratio, index_dim]`."""
        with without_autocast(rows):
            k = self.k_norm(rows.to(compute_dtype(rows)).mean(2).to(rows.dtype))
            return self.rotated(k.unsqueeze(2), numbers * self.config.index_ratio).squeeze(2)


class QwenSparseAttention(IndexedAttention[tuple[Tensor, Keys]]):
    """Grouped attention of which all heads read the pools that the indexer scores best:

        P_t = the best complete pools by I_tp, of index_budget tokens in all, and the tokens behind the last one
        o_t = softmax(q_t k_Pᵀ / sqrt(K)) v_P

    Where no sequence has more than `index_budget` tokens it is softmax attention, and nothing is scored.
    """

    config: QSAConfig

    def __init__(self, d_model: int, config: QSAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.block = config.index_ratio
        self.indexer = PoolIndexer(
            d_model, config.index_heads, config.index_dim, config, config.own_eps(norm_eps)
        )

    def index(self, asked: Asked) -> tuple[Tensor, Keys]:
        q, raw = self.indexer(asked.x, asked.positions)
        return q, asked.past.passing("index_keys", raw, self.config.index_ratio, self.indexer.pooled)

    def pick(self, index: tuple[Tensor, Keys], asked: Asked) -> Tensor | None:
        c, past, (q, keys) = self.config, asked.past, index
        if max(past.lengths) <= c.index_budget:
            return None
        return lightning_indexer(
            q,
            keys,
            q.new_ones(q.shape[:3]),
            count=c.index_budget // c.index_ratio,
            block=c.index_ratio,
            tokens=past.lengths,
            cu_seqlens=past.seqs,
        )

    def divergence(self, index: tuple[Tensor, Keys], asked: Asked, picked: Tensor | None) -> Tensor:
        """Of pools: attention's largest share of a token of each."""
        q, keys = index
        # Of pools there is a tensor of each packed sequence.
        laid = torch.cat(keys, dim=1) if isinstance(keys, tuple) else keys
        assert isinstance(laid, Tensor)
        return indexer_loss(
            q, laid, q.new_ones(q.shape[:3]), asked.q, asked.k, picked, block=self.block,
            scale=self.config.logit_scale, cu_seqlens=asked.past.seqs,
        )  # fmt: skip

    @property
    def memory(self) -> GrowingMemory:
        """Keys and values, of which the pools' are read; an index key of each pool; and of the tokens behind the last
        one the raw keys."""
        c, held = self.config, super().memory
        tail = {"index_keys_tail": Entry((c.index_ratio - 1, c.index_dim))}
        return GrowingMemory(held.kind, held.growing, tail)

    def index_entries(self) -> dict[str, Entry]:
        return {"index_keys": Entry((self.config.index_dim,), stride=self.config.index_ratio)}

    @property
    def most_read(self) -> int | None:
        return None if self.config.dense else self.config.index_budget + self.config.index_ratio - 1

    def index_flops(self, length: int) -> float:
        """A product of each token and index head with the key of each pool before, and the sum over heads."""
        c = self.config
        return c.index_heads * (c.index_dim + 1) * length / c.index_ratio
