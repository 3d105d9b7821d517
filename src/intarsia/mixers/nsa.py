"""Native sparse attention (Yuan et al. 2025, arXiv:2502.11089): compressed, selected and nearby tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.filling import FillsItself
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import RMSNorm
from intarsia.layers.projections import linear
from intarsia.layers.qk_clip import RowScale, row_scales
from intarsia.layers.rope import positions_of, rotate_first
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.attention import Attention
from intarsia.mixers.base import About, GeneratorOf, MixerOutput, positive
from intarsia.mixers.pooling import Past, tails_of
from intarsia.mixers.sparse import SparseAttentionConfig
from intarsia.ops import Sequences, compressed_attention, pick_blocks, softmax_attention, sparse_attention
from intarsia.ops.attention import largest_logit
from intarsia.ops.compressed import largest_compressed_logit
from intarsia.ops.keys import Keys
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.sparse_call import refuse_room


@dataclass(frozen=True)
class NSAConfig(SparseAttentionConfig):
    """The options of grouped attention, and those of the three branches.

    One key and value of every `compress_stride` tokens (the paper's d) stands for the last `compress_block` of them (l;
    the blocks overlap), and is made by a network with `compress_dim` hidden channels (`head_dim` by default). What the
    query heads of a key-value head give those decides which `select_count` (n) blocks of `select_block` (l') tokens
    they read together, the `select_first` first and the `select_last` up to the own one always among them. Of the last
    `window` (w) tokens, the own one among them, all are read.
    """

    type: ClassVar[str] = "nsa"
    about = About(
        title="Native sparse attention",
        year=2025,
        source="arXiv:2502.11089",
        family="softmax",
        equation="o_t = sum_c g_t,c softmax(q_t K_c^T) V_c, c = compressed, top_n blocks, window",
        brought="sparse from the first step of training: what attention gives compressed keys picks blocks",
        operator="compressed_attention",
        example={"num_heads": 8, "head_dim": 128, "num_kv_heads": 2},
    )
    compress_block: int = field(default=32, kw_only=True)
    compress_stride: int = field(default=16, kw_only=True)
    compress_dim: int | None = field(default=None, kw_only=True)
    select_block: int = field(default=64, kw_only=True)
    select_count: int = field(default=16, kw_only=True)
    select_first: int = field(default=1, kw_only=True)
    select_last: int = field(default=2, kw_only=True)
    window: int = field(default=512, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            compress_dim=self.compress_dim,
            select_block=self.select_block,
            select_count=self.select_count,
            window=self.window,
        )
        if self.compress_block % self.compress_stride or self.select_block % self.compress_stride:
            raise ConfigError(
                f"compress_block={self.compress_block} and select_block={self.select_block} are multiples of "
                f"compress_stride={self.compress_stride}"
            )
        if min(self.select_first, self.select_last) < 0 or self.always > self.select_count:
            raise ConfigError(
                f"of select_count={self.select_count} blocks select_first={self.select_first} and "
                f"select_last={self.select_last} are always read: none of them negative, and not more together"
            )
        if self.qk_norm == "channels":
            raise ConfigError("nsa norms each head: qk_norm is 'none' or 'head'")

    @property
    def always(self) -> int:
        """How many blocks are read whatever their scores."""
        return self.select_first + self.select_last

    @property
    def selected(self) -> int:
        """How many tokens the selected branch reads at most."""
        return self.select_count * self.select_block

    def build(self, d_model: int, norm_eps: float = 1e-5) -> NativeSparseAttention:
        return NativeSparseAttention(d_model, self, norm_eps)


class Compressor(FillsItself):
    """The keys, or the values, of a block of l tokens j as one, of each head alike:

        c = W silu(U [x_1 + place_1; ...; x_l + place_l])

    The paper has "a learnable MLP with intra-block position encoding": the number of its layers, the nonlinearity and
    the initial values are chosen here. Places begin at zero, matrices as PyTorch's.
    """

    def __init__(self, block: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.empty(block, channels))
        self.up = nn.Parameter(torch.empty(hidden, block * channels))
        self.down = nn.Parameter(torch.empty(channels, hidden))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.places.zero_()
        for name in ("up", "down"):
            weight = getattr(self, name)
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator_of(name))

    def forward(self, rows: Tensor) -> Tensor:
        """`[B, m, heads, K]` of blocks `[B, m, l, heads, K]`, computed in float32 (float64 for float64)."""
        if not rows.shape[1]:
            return rows.new_zeros(rows.shape[0], 0, *rows.shape[3:])
        with without_autocast(rows):
            wide = compute_dtype(rows)
            places, up, down = (x.to(wide) for x in (self.places, self.up, self.down))
            x = (rows.to(wide) + places[:, None]).transpose(2, 3).flatten(3)
            return F.linear(F.silu(F.linear(x, up)), down).to(rows.dtype)

    def flops(self) -> int:
        """Of one block of one head."""
        return 2 * (self.up.numel() + self.down.numel())


class NativeSparseAttention(Attention):
    """Three attentions of the same queries, each with keys and values of its own:

        c_e = compress(k of the block that ends with the stride e)        seen from its last token on
        P_gt = the first and the last blocks, and the best b by sum_{h in g} sum_e softmax_e(q_ht · c_e / sqrt(K)) n_eb
        o_ht = g_ht,1 softmax(q_ht cᵀ) c' + g_ht,2 softmax(q_ht k_Pᵀ) v_P + g_ht,3 softmax(q_ht k_Wᵀ) v_W
        g = sigmoid(W x)

    n_eb is the number of strides that e and b have in common (the paper's equation 9), W the window. Blocks and windows
    are the paper's; that compressed keys are rotated as their first token is, and the gates a linear map, is not said
    there. A token before which no block is complete gets nothing of the first attention. Where no sequence has more
    tokens than the second reads, that reads all.
    """

    config: NSAConfig

    def __init__(self, d_model: int, config: NSAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        c, kv = config, config.kv_heads * config.head_dim
        self.compressed_k_proj = linear(d_model, kv, bias=c.bias)
        self.compressed_v_proj = linear(d_model, kv, bias=c.bias)
        self.window_k_proj = linear(d_model, kv, bias=c.bias)
        self.window_v_proj = linear(d_model, kv, bias=c.bias)
        self.compressed_k_norm = self.window_k_norm = None
        if c.qk_norm == "head":
            eps = c.own_eps(norm_eps)
            self.compressed_k_norm = RMSNorm(c.head_dim, eps, c.zero_centered_qk_norm)
            self.window_k_norm = RMSNorm(c.head_dim, eps, c.zero_centered_qk_norm)
        hidden = c.head_dim if c.compress_dim is None else c.compress_dim
        self.compress_k = Compressor(c.compress_block, c.head_dim, hidden)
        self.compress_v = Compressor(c.compress_block, c.head_dim, hidden)
        self.gate_proj = linear(d_model, 3 * c.num_heads)

    def forward(
        self,
        x: Tensor,
        state: GrowingState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
    ) -> MixerOutput[GrowingState]:
        self.check_input(x, state, seqs)
        c, positions = self.config, positions_of(x, state, seqs)
        q, k, v = self._projected(x, positions)
        near = (
            self._place(self.window_k_proj(x), self.window_k_norm, positions),
            self._heads(self.window_v_proj(x)),
        )
        keys: Keys = k
        values: Keys = v
        grown, tails = None, tails_of(state)
        if state is not None:
            grown = state.grow(x, seqs)
            keys, values = grown.append(keys=k, values=v)
            refuse_room(keys)
        past = Past.of(x, state, seqs, grown, isinstance(keys, Tensor), tails)
        compressed = self._compressed(x, past)
        o_compressed = compressed_attention(
            q,
            *compressed,
            stride=c.compress_stride,
            width=c.compress_block,
            scale=c.logit_scale,
            tokens=past.lengths,
            cu_seqlens=seqs,
        )
        o_selected = self._selected(q, keys, values, compressed[0], past)
        o_window = softmax_attention(
            q, *self._nearby(near, past), scale=c.logit_scale, window=c.window, cu_seqlens=seqs
        )
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (3, c.num_heads, 1)).unbind(2)
        o = gates[0] * o_compressed + gates[1] * o_selected + gates[2] * o_window
        y = self._finished(o, x)
        after = None if grown is None else grown.end()
        if not side:
            return y, after
        largest = None
        if "largest_logits" in side:
            largest = self._largest(q, k, near[0], compressed[0], state, seqs)
        return y, after, SideResults(largest)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.kv_heads, self.config.head_dim))

    def _compressed(self, x: Tensor, past: Past) -> tuple[Keys, Keys]:
        """The keys and values of blocks."""
        c = self.config
        stride, width = c.compress_stride, c.compress_block

        def of_keys(rows: Tensor, numbers: Tensor) -> Tensor:
            keys: Tensor = self.compress_k(rows)
            if self.compressed_k_norm is not None:
                keys = self.compressed_k_norm(keys)
            # The first of a block, or where some of it stand before the first token, that.
            first = ((numbers + 1) * stride - width).clamp(min=0)
            return rotate_first(keys, first, c.rotated, c.rope_theta, c.yarn)

        def of_values(rows: Tensor, numbers: Tensor) -> Tensor:
            values: Tensor = self.compress_v(rows)
            return values

        k, v = self._heads(self.compressed_k_proj(x)), self._heads(self.compressed_v_proj(x))
        keys = past.passing("compressed_keys", k, stride, of_keys, width)
        return keys, past.passing("compressed_values", v, stride, of_values, width)

    def _selected(self, q: Tensor, keys: Keys, values: Keys, compressed: Keys, past: Past) -> Tensor:
        """Attention to the blocks that attention to compressed keys picks."""
        c = self.config
        if max(past.lengths) <= c.selected:
            return softmax_attention(q, keys, values, scale=c.logit_scale, cu_seqlens=past.seqs)
        picked = pick_blocks(
            q,
            compressed,
            count=c.select_count,
            block=c.select_block,
            groups=c.kv_heads,
            stride=c.compress_stride,
            width=c.compress_block,
            score="softmax",
            pooling="sum",
            first=c.select_first,
            last=c.select_last,
            scale=c.logit_scale,
            tokens=past.lengths,
            cu_seqlens=past.seqs,
        )
        return sparse_attention(
            q, keys, values, picked, block=c.select_block, scale=c.logit_scale, cu_seqlens=past.seqs
        )

    def _nearby(self, near: tuple[Tensor, Tensor], past: Past) -> tuple[Keys, Keys]:
        """The keys and values of the last tokens before the new ones, with theirs."""
        before = self.config.window - 1
        return past.recent("window_keys", near[0], before), past.recent("window_values", near[1], before)

    def _largest(
        self,
        q: Tensor,
        k: Tensor,
        near: Tensor,
        compressed: Keys,
        state: GrowingState | None,
        seqs: Sequences | None,
    ) -> Tensor:
        """The largest logit of each head, of all branches; behind a state of the new tokens' own keys."""
        c = self.config
        scale = c.logit_scale
        largest = largest_logit(q, k, scale=scale, seqs=seqs).maximum(
            largest_logit(q, near, scale=scale, window=c.window, seqs=seqs)
        )
        if state is not None:
            return largest
        of_blocks = largest_compressed_logit(
            q, compressed, stride=c.compress_stride, width=c.compress_block, scale=scale, seqs=seqs
        )
        return largest.maximum(of_blocks)

    @property
    def memory(self) -> GrowingMemory:
        """Keys and values, of which the selected are read; those of blocks, which all are; and of the last tokens what
        the next block is made of, and keys and values of the window."""
        c = self.config
        shape = (c.kv_heads, c.head_dim)
        entry, block = Entry(shape, reads=c.selected), Entry(shape, stride=c.compress_stride)
        open_block, window = Entry((c.compress_block - 1, *shape)), Entry((c.window - 1, *shape))
        return GrowingMemory(
            "key-value",
            {"keys": entry, "values": entry, "compressed_keys": block, "compressed_values": block},
            {
                "compressed_keys_tail": open_block,
                "compressed_values_tail": open_block,
                "window_keys_tail": window,
                "window_values_tail": window,
            },
        )

    def logit_scales(self, factor: Tensor) -> Iterator[RowScale]:
        # The queries meet the keys of three branches, so they alone are scaled.
        c = self.config
        shared = c.qk_norm == "head"
        share = factor.min().expand(c.head_dim) if shared else factor.repeat_interleave(c.head_dim)
        yield from row_scales(self.q_proj if self.q_norm is None else self.q_norm, share)

    def mixing_flops(self, length: int) -> float:
        """Of each branch two products with each key that is read, a third with compressed keys to select, and the
        networks that make these."""
        c = self.config
        H, K = c.num_heads, c.head_dim
        blocks = length // c.compress_stride
        made = c.kv_heads * blocks * (self.compress_k.flops() + self.compress_v.flops()) / length
        # The blocks that a token sees, averaged: one of which the last token is n strides before sees n more.
        seen = blocks - c.compress_block // c.compress_stride + 1
        last = length - blocks * c.compress_stride + 1
        pairs = seen * (c.compress_stride * (seen - 1) / 2 + last) if seen > 0 else 0
        scored = 3 if length > c.selected else 2
        read = softmax_attention_flops(H, K, K, length, c.selected)
        near = softmax_attention_flops(H, K, K, length, c.window)
        return read + near + 2 * scored * H * K * pairs / length + made
