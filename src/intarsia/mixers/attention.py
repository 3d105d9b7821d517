"""Softmax attention with grouped heads (Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import RMSNorm
from intarsia.layers.projections import linear
from intarsia.layers.qk_clip import ClipsLogits, RowScale, row_scales
from intarsia.layers.rope import Yarn, positions_of, rotate_first
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.base import (
    About,
    GeneratorOf,
    Mixer,
    MixerOutput,
    NormedConfig,
    positive,
)
from intarsia.ops import Sequences, softmax_attention
from intarsia.ops.attention import largest_logit
from intarsia.ops.keys import Keys

QKNorm = Literal["none", "head", "channels"]


@dataclass(frozen=True)
class AttentionConfig(NormedConfig):
    """The options of softmax attention.

    `num_kv_heads` (all heads by default) key-value heads are each shared by `num_heads / num_kv_heads` query
    heads. `rope` is the share of each head's channels that is rotated: 0 (no positions), 1 (all), or between
    (partial, for instance Qwen3-Next's 0.25); `yarn` stretches the rotation to longer texts (gpt-oss).

    `qk_norm` puts an RMSNorm on queries and keys before the rotation: over each head, with one weight for all heads
    (Qwen3, and `zero_centered_qk_norm` in Qwen3-Next), or over all heads' channels together (OLMo). `output_gate`
    multiplies each channel of the heads' outputs with a sigmoid of the input (Qwen3-Next; Qiu et al. 2025,
    arXiv:2505.06708). `sinks` gives each head a learned logit that takes part in the softmax and has no value
    (gpt-oss). `bias` gives one to each projection (gpt-oss). `scale` is what the logits are multiplied with (Granite),
    `1 / sqrt(head_dim)` by default.
    """

    type: ClassVar[str] = "attention"
    about = About(
        title="Softmax attention",
        year=2017,
        source="arXiv:1706.03762",
        family="softmax",
        equation="o_t = softmax(q_t K^T / sqrt(K)) V",
        brought="every token looks at every earlier one: nothing is forgotten, and everything is kept",
        operator="softmax_attention",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rope: float = 1.0
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    qk_norm: QKNorm = "none"
    zero_centered_qk_norm: bool = False
    output_gate: bool = False
    sinks: bool = False
    bias: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim, num_kv_heads=self.num_kv_heads)
        positive(rope_theta=self.rope_theta, scale=self.scale)
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if not 0 <= self.rope <= 1:
            raise ConfigError(f"rope is a share of the head's channels, in [0, 1]; got {self.rope}")
        if self.rotated % 2:
            raise ConfigError(
                f"rope={self.rope} rotates {self.rotated} of {self.head_dim} channels; it must be even"
            )
        if self.yarn is not None and not self.rotated:
            raise ConfigError("yarn stretches a rotation, and rope=0 has none")
        if self.qk_norm not in get_args(QKNorm):
            raise ConfigError(f"qk_norm must be 'none', 'head' or 'channels'; got {self.qk_norm!r}")
        if self.zero_centered_qk_norm and self.qk_norm == "none":
            raise ConfigError("zero_centered_qk_norm needs a qk_norm; it is 'none'")

    @property
    def kv_heads(self) -> int:
        """HKV."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotated(self) -> int:
        """How many channels of each head are rotated."""
        return round(self.head_dim * self.rope)

    @property
    def logit_scale(self) -> float:
        """What the logits are multiplied with."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Attention:
        return Attention(d_model, self, norm_eps)


class Attention(ClipsLogits, Mixer[GrowingState]):
    """`y = W_o softmax(q kᵀ / sqrt(K)) v`, with q and k rotated by position where `rope` says so, and with another
    factor than `1 / sqrt(K)` where `scale` says so.

    The whole of the options:

        q = rope(norm(W x + b))    k = rope(norm(W x + b))    v = W x + b
        o = sum_j exp(q k_jᵀ / sqrt(K)) v_j / (exp(sink) + sum_j exp(q k_jᵀ / sqrt(K)))
        y = W_o (sigmoid(W x + b) * o) + b

    `output_gate_proj` has weights of its own; Qwen3-Next keeps each head's in `q_proj`, behind those of its query.
    """

    window: int | None = None
    """How many tokens each sees, itself included; None: all up to itself."""

    def __init__(self, d_model: int, config: AttentionConfig, norm_eps: float = 1e-5) -> None:
        norm_eps = config.own_eps(norm_eps)
        super().__init__(d_model)
        self.config = config
        H, HKV, K, bias = config.num_heads, config.kv_heads, config.head_dim, config.bias
        self.q_proj = linear(d_model, H * K, bias=bias)
        self.k_proj = linear(d_model, HKV * K, bias=bias)
        self.v_proj = linear(d_model, HKV * K, bias=bias)
        self.o_proj = linear(H * K, d_model, bias=bias)
        self.q_norm = self.k_norm = self.output_gate_proj = None
        if config.qk_norm != "none":
            sizes = (K, K) if config.qk_norm == "head" else (H * K, HKV * K)
            norms = (RMSNorm(size, norm_eps, config.zero_centered_qk_norm) for size in sizes)
            self.q_norm, self.k_norm = norms
        if config.output_gate:
            self.output_gate_proj = linear(d_model, H * K, bias=bias)
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.sinks is not None:
            self.sinks.normal_(0, std, generator=generator_of("sinks"))

    def forward(
        self,
        x: Tensor,
        state: GrowingState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
    ) -> MixerOutput[GrowingState]:
        self.check_input(x, state, seqs)
        c = self.config
        scale = c.logit_scale
        q, k, v = self._projected(x, positions_of(x, state, seqs))
        largest = largest_logit(q, k, scale=scale, window=self.window, seqs=seqs) if side else None
        keys: Keys = k
        values: Keys = v
        if state is not None:
            grown = state.grow(x, seqs)
            keys, values = grown.append(keys=k, values=v)
            state = grown.end()
        o = softmax_attention(
            q, keys, values, scale=scale, window=self.window, sinks=self.sinks, cu_seqlens=seqs
        )
        y = self._finished(o, x)
        return (y, state, SideResults(largest)) if side else (y, state)

    def _projected(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, HKV, K]`."""
        q = self._place(self.q_proj(x), self.q_norm, positions)
        k = self._place(self.k_proj(x), self.k_norm, positions)
        return q, k, self.v_proj(x).unflatten(-1, (self.config.kv_heads, self.config.head_dim))

    def _finished(self, o: Tensor, x: Tensor) -> Tensor:
        """The output `[B, T, D]` of what the heads found, `[B, T, H, K]`."""
        o = o.flatten(-2)
        if self.output_gate_proj is not None:
            o = o * torch.sigmoid(self.output_gate_proj(x))
        y: Tensor = self.o_proj(o)
        return y

    def _place(self, x: Tensor, norm: RMSNorm | None, positions: Tensor) -> Tensor:
        """Queries or keys `[B, T, heads, K]` of their projection, normed and rotated."""
        c = self.config
        if norm is not None and c.qk_norm == "channels":
            x = norm(x)
        x = x.unflatten(-1, (-1, c.head_dim))
        if norm is not None and c.qk_norm == "head":
            x = norm(x)
        return rotate_first(x, positions, c.rotated, c.rope_theta, c.yarn)

    @property
    def memory(self) -> GrowingMemory:
        """The keys, rotated already, and the values: of all tokens, or of those in the window."""
        entry = Entry((self.config.kv_heads, self.config.head_dim))
        kind = "key-value" if self.window is None else "window"
        return GrowingMemory(kind, {"keys": entry, "values": entry}, window=self.window)

    def logit_scales(self, factor: Tensor) -> Iterator[RowScale]:
        # With grouped heads a key head serves several queries, so the queries alone are scaled there.
        c = self.config
        grouped = c.num_heads != c.kv_heads
        share = factor if grouped else factor.sqrt()
        # A norm of each head has one weight for all: the head that needs it most decides.
        shared = c.qk_norm == "head"
        share = share.min().expand(c.head_dim) if shared else share.repeat_interleave(c.head_dim)
        yield from row_scales(self.q_proj if self.q_norm is None else self.q_norm, share)
        if not grouped:
            yield from row_scales(self.k_proj if self.k_norm is None else self.k_norm, share)

    def mixing_flops(self, length: int) -> float:
        c = self.config
        return softmax_attention_flops(c.num_heads, c.head_dim, c.head_dim, length, self.window)
