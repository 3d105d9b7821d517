"""DeepSeek sparse attention (DeepSeek-V3.2, 2025, arXiv:2512.02556): latent attention to what an indexer picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.filling import FillsItself
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.flops import keys_seen
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import LayerNorm
from intarsia.layers.rope import positions_of, rotate_first
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.base import About, GeneratorOf, HandedOn, Layer, MixerOutput, positive
from intarsia.mixers.indexed import TOLD, check_index_loss, told_of_index
from intarsia.mixers.mla import LatentAttention, MLAConfig
from intarsia.mixers.pooling import Past, tails_of
from intarsia.ops import (
    Sequences,
    indexer_loss,
    latent_attention,
    lightning_indexer,
    picked_share,
    softmax_attention,
    sparse_latent_attention,
)
from intarsia.ops.attention import largest_logit
from intarsia.ops.keys import Keys
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.sparse_call import refuse_room


@dataclass(frozen=True)
class DSAConfig(MLAConfig):
    """The options of MLA, and those of the indexer that picks the `top_k` tokens that each token reads.

    It has `index_heads` query heads and one key, of `index_dim` channels, of which the first `rope_dim` are rotated
    where those of MLA are. Queries are made of MLA's query latent, or without a `q_rank` of the input. `index_relu`
    lets negative products count as nothing.

    The indexer has a loss of its own, which training adds `index_loss` times: how far its scores are from what
    attention gives the tokens that it picked, summed over tokens (`indexer_loss`). It reaches nothing but the indexer;
    0 leaves the indexer as it is. `dense` lets attention read everything, as before it was sparse, and the indexer
    learn from all of it: the stage that V3.2 begins with, all else frozen.

    With an `index_pool` P the indexer looks at one key of every P tokens, a mean that gates weigh channel by channel,
    and picks `top_k / P` pools of those whose last token is there; the tokens behind the last pool are always read
    (GLM-5.3; without rotations).

    A layer that `shares` has no indexer and reads what the last layer before it that has one picked (GLM-5.2;
    IndexCache, arXiv:2603.12201).
    """

    type: ClassVar[str] = "dsa"
    about = About(
        title="DeepSeek sparse attention",
        year=2025,
        source="arXiv:2512.02556",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = top_s sum_h w_t,h relu(q'_t,h k'_s)",
        brought="a small indexer looks at every token and attention reads only the few that it picks",
        operator="sparse_latent_attention",
        example={
            "num_heads": 8,
            "kv_rank": 512,
            "nope_dim": 128,
            "rope_dim": 64,
            "v_dim": 128,
            "rotate": True,
            "index_heads": 16,
            "index_dim": 128,
            "top_k": 2048,
        },
    )
    top_k: int = field(kw_only=True)
    index_heads: int = field(default=64, kw_only=True)
    index_dim: int = field(default=128, kw_only=True)
    index_relu: bool = field(default=True, kw_only=True)
    index_norm_eps: float = field(default=1e-6, kw_only=True)
    index_loss: float = field(default=0.01, kw_only=True)
    index_pool: int = field(default=1, kw_only=True)
    dense: bool = field(default=False, kw_only=True)
    shares: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(top_k=self.top_k, index_heads=self.index_heads, index_dim=self.index_dim)
        positive(index_norm_eps=self.index_norm_eps, index_pool=self.index_pool)
        if self.top_k % self.index_pool:
            raise ConfigError(f"top_k={self.top_k} tokens are of pools of index_pool={self.index_pool}")
        if self.index_pool > 1 and self.rotate:
            raise ConfigError(
                "pools of index keys have no place to be rotated at: index_pool needs rotate=False"
            )
        check_index_loss(self.index_loss)
        if self.rotate and self.index_dim < self.rope_dim:
            raise ConfigError(
                f"the indexer rotates the {self.rope_dim} channels of rope_dim and has index_dim={self.index_dim}"
            )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> SparseLatentAttention:
        return SparseLatentAttention(d_model, self)


class HeadWeights(KeepsFloat32, nn.Linear):
    """How much each head of an indexer counts, `W x / sqrt(H)`: float32, as scores that are compared need to be."""

    float32_names = ("weight",)

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, H]`, float32 (float64 for float64)."""
        with without_autocast(x):
            return F.linear(x.to(self.weight.dtype), self.weight) * self.out_features**-0.5


class LightningIndexer(FillsItself):
    """What is compared to choose what a token reads:

    I_ts = sum_h w_th relu(q_th · k_s / sqrt(index_dim))
    q = rope(W c_q)        k = rope(layernorm(W x))        w = W x / sqrt(H)

    and of pools s of P tokens p, channel by channel, k_s = sum_p softmax_p(W x_p + place_p) k_p.
    """

    def __init__(self, d_model: int, config: DSAConfig) -> None:
        super().__init__()
        self.config = config
        q_input = d_model if config.q_rank is None else config.q_rank
        self.q_proj = nn.Linear(q_input, config.index_heads * config.index_dim, bias=False)
        self.k_proj = nn.Linear(d_model, config.index_dim, bias=False)
        self.k_norm = LayerNorm(config.index_dim, config.index_norm_eps)
        self.head_weights = HeadWeights(d_model, config.index_heads)
        self.pool_gate = self.pool_places = None
        if config.index_pool > 1:
            self.pool_gate = nn.Linear(d_model, config.index_dim, bias=False)
            self.pool_places = nn.Parameter(torch.empty(config.index_pool, config.index_dim))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.pool_places is not None:
            self.pool_places.zero_()

    def forward(self, x: Tensor, q_input: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, index_dim]`, keys `[B, T, index_dim]` and weights `[B, T, H]`. What it is given stands
        apart from the model's gradients: no loss of the indexer reaches the model."""
        x, q_input = x.detach(), q_input.detach()
        q = self.q_proj(q_input).unflatten(-1, (self.config.index_heads, self.config.index_dim))
        k = self.k_norm(self.k_proj(x))
        if positions is not None:
            q, k = self._rotated(q, positions), self._rotated(k.unsqueeze(2), positions).squeeze(2)
        return q, k, self.head_weights(x)

    def gated(self, x: Tensor, k: Tensor) -> Tensor:
        """What pooling needs of each token, its key and its gate: `[B, T, 2 index_dim]`."""
        assert self.pool_gate is not None
        return torch.cat([k, self.pool_gate(x.detach())], dim=-1)

    def pooled(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """`[B, m, index_dim]` of pools `[B, m, P, 2 index_dim]`: `sum_p softmax_p(gate_p + place_p) k_p`."""
        assert self.pool_places is not None
        k, gate = rows.chunk(2, dim=-1)
        wide = compute_dtype(gate)
        weights = (gate.to(wide) + self.pool_places.to(wide)).softmax(dim=2)
        return (weights.to(k.dtype) * k).sum(2)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        c = self.config
        return rotate_first(x, positions, c.rope_dim, c.rope_theta, c.yarn)


class SparseLatentAttention(LatentAttention):
    """MLA that reads the `top_k` tokens which its indexer scores best:

        P_t = the top_k of s <= t by I_ts
        y = W_o softmax([q_h; q_shared,h]ᵀ [k_h; k_shared]_P / sqrt(K)) v_h,P

    Where no sequence has more than `top_k` tokens it is MLA, and nothing is scored. No gradient comes through the
    choice: the model's loss does not reach the indexer, which is trained by the side result `loss`.
    """

    config: DSAConfig
    untrained: ClassVar[tuple[str, ...]] = ("indexer",)
    hands_on = True

    def __init__(self, d_model: int, config: DSAConfig) -> None:
        super().__init__(d_model, config)
        self.indexer = None if config.shares else LightningIndexer(d_model, config)
        self.takes_handed = config.shares
        if config.index_loss and not config.shares:
            self.side_results = (*self.side_results, *TOLD)

    def forward(
        self,
        x: Tensor,
        state: GrowingState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
        handed: HandedOn | None = None,
    ) -> MixerOutput[GrowingState]:
        self.check_input(x, state, seqs)
        c = self.config
        positions = positions_of(x, state, seqs) if c.rotate else None
        q_input, q, latents = self._projected(x, positions)
        largest = None
        if "largest_logits" in side:
            largest = largest_logit(q, self._expanded(latents)[0], scale=c.scale, seqs=seqs)
        lengths = _lengths_after(x, state, seqs)
        index = None if self.indexer is None else self.indexer(x, q_input, positions)
        read: Keys = latents
        keys: Keys | None = None if index is None else index[1]
        grown, tails = None, tails_of(state)
        if state is not None:
            grown = state.grow(x, seqs)
            (read,) = grown.append(latents=latents)
            refuse_room(read)
            if index is not None and c.index_pool == 1:
                (keys,) = grown.append(index_keys=index[1])
        if index is not None and c.index_pool > 1:
            assert self.indexer is not None
            past = Past.of(x, state, seqs, grown, isinstance(read, Tensor), tails)
            rows = self.indexer.gated(x, index[1])
            keys = past.passing("index_keys", rows, c.index_pool, self.indexer.pooled)
        best = None
        if index is None:
            best = self._shared(handed)
        elif max(lengths) > c.top_k and ("picked" in side or not c.dense):
            assert keys is not None
            best = lightning_indexer(
                index[0], keys, index[2], count=c.top_k // c.index_pool, block=c.index_pool, relu=c.index_relu,
                tokens=lengths, cu_seqlens=seqs,
            )  # fmt: skip
        picked = None if c.dense else best
        if picked is not None:
            o = sparse_latent_attention(
                q, read, self._up(), picked, block=c.index_pool, scale=c.scale, cu_seqlens=seqs
            )
        elif state is None:
            o = softmax_attention(q, *self._expanded(latents), scale=c.scale, cu_seqlens=seqs)
        else:
            o = latent_attention(q, read, self._up(), scale=c.scale, cu_seqlens=seqs)
        told_by_index = SideResults()
        if index is not None and side:
            learned, shown = index, best
            told_by_index = told_of_index(
                side,
                c.index_loss,
                state is None,
                lambda: self._divergence(learned, keys, q, latents, picked, seqs),
                None if shown is None else lambda: self._shares(q, latents, shown, seqs),
            )
        y = self._finished(o, x)
        results = (y, None if grown is None else grown.end())
        told = (told_by_index.beside(SideResults(largest)),) if side else ()
        if handed is None:
            return (*results, *told)
        return (*results, *told, HandedOn(handed.values, True, picked))

    @torch.no_grad()
    def _asked(self, q: Tensor) -> Tensor:
        """What each head asks of the latents themselves, which are one key for all: `[B, T, H, kv_rank + rope_dim]`."""
        c = self.config
        own, shared = q.split([c.nope_dim, c.rope_dim], dim=-1)
        asked = torch.einsum("bthn,hnr->bthr", own, self._up()[:, : c.nope_dim].to(q.dtype))
        return torch.cat([asked, shared], dim=-1)

    def _shares(
        self, q: Tensor, latents: Tensor, picked: Tensor, seqs: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        return picked_share(
            self._asked(q), latents[:, :, None], picked, block=c.index_pool, scale=c.scale, cu_seqlens=seqs
        )

    def _divergence(
        self,
        index: tuple[Tensor, Tensor, Tensor],
        keys: Keys | None,
        q: Tensor,
        latents: Tensor,
        picked: Tensor | None,
        seqs: Sequences | None,
    ) -> Tensor:
        """`[B, T]`: how far the indexer is from attention."""
        c = self.config
        # Of pools there is a tensor of each packed sequence.
        laid = torch.cat(keys, dim=1) if isinstance(keys, tuple) else keys
        assert isinstance(laid, Tensor)
        return indexer_loss(
            index[0], laid, index[2], self._asked(q), latents[:, :, None], picked, block=c.index_pool,
            relu=c.index_relu, scale=c.scale, cu_seqlens=seqs,
        )  # fmt: skip

    def _shared(self, handed: HandedOn | None) -> Tensor | None:
        """What an earlier layer picked."""
        if handed is None or not handed.indexed:
            raise ConfigError(
                "a layer of dsa that shares reads what an earlier layer of dsa picked: there is none with an indexer"
            )
        return handed.picked

    def for_inference(self) -> Layer[GrowingState]:
        layer: Layer[GrowingState] = self
        return layer

    @property
    def memory(self) -> GrowingMemory:
        """What MLA remembers, of which `top_k` tokens' are read; and the index key of each token, or pool of them, all
        of which are; of pools also what the next one is made of."""
        c = self.config
        entries = {"latents": Entry((c.kv_rank + c.rope_dim,), reads=self._most_read)}
        if c.shares:
            return GrowingMemory("latent", entries)
        entries["index_keys"] = Entry((c.index_dim,), stride=c.index_pool)
        if c.index_pool == 1:
            return GrowingMemory("latent", entries)
        return GrowingMemory(
            "latent", entries, {"index_keys_tail": Entry((c.index_pool - 1, 2 * c.index_dim))}
        )

    @property
    def _most_read(self) -> int | None:
        """The tokens that are read at most; None: all."""
        return None if self.config.dense else self.config.top_k + self.config.index_pool - 1

    def mixing_flops(self, length: int) -> float:
        """Of the indexer two products for each pair of tokens and index head, and its heads' weights; of attention two
        products with each latent that is read, which all heads share."""
        c = self.config
        read = 2 * c.num_heads * (2 * c.kv_rank + c.rope_dim) * keys_seen(length, self._most_read)
        if c.shares:
            return read
        return read + 2 * c.index_heads * (c.index_dim + 1) * keys_seen(length) / c.index_pool


def _lengths_after(x: Tensor, state: GrowingState | None, seqs: Sequences | None) -> Sequence[int]:
    """How many tokens each sequence has with those of x."""
    if state is not None:
        return state.tokens_after(x, seqs)
    return (x.shape[1],) * x.shape[0] if seqs is None else seqs.lengths
