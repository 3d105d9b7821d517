"""The frame of sparse attention with grouped heads: an indexer scores, a selector picks blocks of tokens, and attention
reads what was picked and nothing else. A mixer of the kind says how it picks, and what it remembers for that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.rope import positions_of
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
        largest = largest_logit(q, k, scale=scale, seqs=seqs) if side else None
        keys: Keys = k
        values: Keys = v
        grown, tails = None, tails_of(state)
        if state is not None:
            grown = state.grow(x, seqs)
            keys, values = grown.append(keys=k, values=v)
            refuse_room(keys)
        past = Past.of(x, state, seqs, grown, isinstance(keys, Tensor), tails)
        picked = self.choose(Asked(x, q, k, v, keys, positions, past))
        if picked is None:
            o = softmax_attention(q, keys, values, scale=scale, cu_seqlens=seqs)
        else:
            o = sparse_attention(q, keys, values, picked, block=self.block, scale=scale, cu_seqlens=seqs)
        y = self._finished(o, x)
        after_state = None if grown is None else grown.end()
        return (y, after_state, SideResults(largest)) if side else (y, after_state)

    def index_entries(self) -> dict[str, Entry]:
        """What it remembers of the tokens to choose by."""
        return {}

    @property
    def most_read(self) -> int:
        """The tokens that are read at most."""
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
