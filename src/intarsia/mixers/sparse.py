"""The frame of sparse attention with grouped heads: an indexer scores, a selector picks blocks of tokens, and attention
reads what was picked and nothing else. A mixer of the kind says how it picks, and what it remembers for that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import RMSNorm
from intarsia.layers.rope import positions_of, rotate_first
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.attention import Attention, AttentionConfig
from intarsia.mixers.base import MixerOutput
from intarsia.mixers.pooling import Past, tails_of
from intarsia.ops import Sequences, softmax_attention, sparse_attention
from intarsia.ops.attention import largest_logit
from intarsia.ops.keys import Keys
from intarsia.ops.sparse_call import refuse_room


@dataclass(frozen=True)
class SparseAttentionConfig(AttentionConfig):
    """The options of softmax attention of which each token reads a part: those of `AttentionConfig` without sinks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks:
            raise ConfigError("sinks=True is not there in sparse attention")


class Indexer(nn.Module):
    """Query heads and one key of `index_dim` channels, with norms and rotations as attention has them, to score by."""

    def __init__(
        self, d_model: int, heads: int, index_dim: int, config: SparseAttentionConfig, norm_eps: float
    ) -> None:
        super().__init__()
        self.config, self.index_dim = config, index_dim
        self.q_proj = nn.Linear(d_model, heads * index_dim, bias=False)
        self.k_proj = nn.Linear(d_model, index_dim, bias=False)
        self.q_norm = RMSNorm(index_dim, norm_eps, config.zero_centered_qk_norm)
        self.k_norm = RMSNorm(index_dim, norm_eps, config.zero_centered_qk_norm)

    def projected(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, H, index_dim]`, normed and rotated, and raw keys `[B, T, index_dim]`; x stands apart from the
        model's gradients."""
        x = x.detach().to(self.k_proj.weight.dtype)
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.index_dim)))
        return self.rotated(q, positions), self.k_proj(x)

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """`[B, T, H, index_dim]`, of which as many of the first channels are rotated as of attention's."""
        c = self.config
        return rotate_first(x, positions, c.rotated, c.rope_theta, c.yarn)


@dataclass(frozen=True)
class Asked:
    """What a mixer of the kind chooses by."""

    x: Tensor
    """`[B, T, D]`."""
    q: Tensor
    """`[B, T, H, K]`, as attention has them."""
    k: Tensor
    """`[B, T, HKV, K]`, of the new tokens."""
    v: Tensor
    """`[B, T, HKV, K]`."""
    keys: Keys
    """Of all tokens."""
    positions: Tensor
    past: Past
    """What came before, and where what is remembered goes."""


class SparseAttention(Attention):
    """`Attention` to the blocks that `choose` picks:

    o_t = softmax(q_t k_Pᵀ / sqrt(K)) v_P        P the tokens up to t of the blocks that t picks

    No gradient comes through the choice. Where it picks everything it may say so, and attention is softmax attention.
    """

    config: SparseAttentionConfig
    block: int = 1
    """The tokens of a block."""

    def choose(self, asked: Asked) -> Tensor | None:
        """What each token reads, as `sparse_attention` takes it; None: everything."""
        raise NotImplementedError

    def chosen(self, asked: Asked, side: tuple[SideName, ...]) -> tuple[Tensor | None, SideResults]:
        """What `choose` says, and what there is to tell of it."""
        return self.choose(asked), SideResults()

    def forward(
        self,
        x: Tensor,
        state: GrowingState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
    ) -> MixerOutput[GrowingState]:
        self.check_input(x, state, seqs)
        positions, scale = positions_of(x, state, seqs), self.config.logit_scale
        q, k, v = self._projected(x, positions)
        largest = largest_logit(q, k, scale=scale, seqs=seqs) if "largest_logits" in side else None
        keys: Keys = k
        values: Keys = v
        grown, tails = None, tails_of(state)
        if state is not None:
            grown = state.grow(x, seqs)
            keys, values = grown.append(keys=k, values=v)
            refuse_room(keys)
        past = Past.of(x, state, seqs, grown, isinstance(keys, Tensor), tails)
        picked, told = self.chosen(Asked(x, q, k, v, keys, positions, past), side)
        if picked is None:
            o = softmax_attention(q, keys, values, scale=scale, cu_seqlens=seqs)
        else:
            o = sparse_attention(q, keys, values, picked, block=self.block, scale=scale, cu_seqlens=seqs)
        y = self._finished(o, x)
        after_state = None if grown is None else grown.end()
        return (y, after_state, told.beside(SideResults(largest))) if side else (y, after_state)

    def index_entries(self) -> dict[str, Entry]:
        """What it remembers of the tokens to choose by."""
        return {}

    @property
    def most_read(self) -> int | None:
        """The tokens that are read at most; None: all."""
        raise NotImplementedError

    def index_flops(self, length: int) -> float:
        """FLOPs per token of the choice, averaged over a sequence of `length`."""
        return 0.0

    @property
    def memory(self) -> GrowingMemory:
        """Keys and values, of which `most_read` tokens' are read, and what it chooses by."""
        entry = Entry((self.config.kv_heads, self.config.head_dim), reads=self.most_read)
        return GrowingMemory("key-value", {"keys": entry, "values": entry, **self.index_entries()})

    def mixing_flops(self, length: int) -> float:
        """Of attention two products with each key that is read, and the choice."""
        c = self.config
        read = softmax_attention_flops(c.num_heads, c.head_dim, c.head_dim, length, self.most_read)
        return read + self.index_flops(length)
