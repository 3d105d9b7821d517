"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434), with or without positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.norm import RMSNorm
from intarsia.layers.qk_clip import ClipsLogits, RowScale
from intarsia.layers.rope import positions_of, rotate
from intarsia.layers.side import SideName, SideResults
from intarsia.layers.states import GrowingTensor, LatentState
from intarsia.mixers.base import About, Cost, Mixer, MixerConfig, MixerOutput, empty_beside, positive
from intarsia.ops import Sequences
from intarsia.ops.attention import causal_attention, largest_logit
from intarsia.ops.finite import attended


@dataclass(frozen=True)
class MLAConfig(MixerConfig):
    """The options of MLA.

    Each head has `nope_dim` query-key channels of its own and shares `rope_dim` key channels with all others;
    `v_dim` value channels. Keys and values are made from a latent of `kv_rank` channels. `rotate` rotates the
    shared channels by position (DeepSeek); without it the layer knows no positions and the shared channels stay
    as they are (NoPE, Kimi Linear). `q_rank` makes the queries through a latent as well.
    """

    type: ClassVar[str] = "mla"
    about = About(
        title="Multi-head latent attention",
        year=2024,
        source="arXiv:2405.04434",
        family="softmax",
        equation="o_t = softmax(q_t [W_k c; k_shared]^T / sqrt(K)) W_v c",
        brought="keys and values are made from one small latent, which is all that is cached",
        operator="softmax",
        example={"num_heads": 8, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128},
    )
    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    rotate: bool = False
    rope_theta: float = 10000.0
    latent_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, kv_rank=self.kv_rank, nope_dim=self.nope_dim, v_dim=self.v_dim)
        positive(q_rank=self.q_rank, rope_theta=self.rope_theta, latent_norm_eps=self.latent_norm_eps)
        if self.rope_dim < 0 or (self.rotate and (self.rope_dim == 0 or self.rope_dim % 2)):
            raise ConfigError(f"rotate needs a positive even rope_dim; got {self.rope_dim}")

    @property
    def key_dim(self) -> int:
        """The query-key channels of a head."""
        return self.nope_dim + self.rope_dim

    def build(self, d_model: int, norm_eps: float = 1e-5) -> LatentAttention:
        return LatentAttention(d_model, self)


class LatentAttention(ClipsLogits, Mixer[LatentState]):
    """MLA:

        c = rmsnorm(W x)            k_shared = W x            [k_h; v_h] = W_h c            q_h = W_h x
        y = W_o softmax([q_h; q_shared,h]ᵀ [k_h; k_shared] / sqrt(K)) v_h

    The cache holds `c` and `k_shared` alone. Decoding uses the absorbed form: `q_hᵀ W_h c` is computed as
    `(W_hᵀ q_h)ᵀ c`, so that keys and values of the past are never made.
    """

    def __init__(self, d_model: int, config: MLAConfig) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        H = config.num_heads
        if config.q_rank is None:
            self.q_proj = nn.Linear(d_model, H * config.key_dim, bias=False)
        else:
            self.q_down_proj = nn.Linear(d_model, config.q_rank, bias=False)
            self.q_norm = RMSNorm(config.q_rank, config.latent_norm_eps)
            self.q_proj = nn.Linear(config.q_rank, H * config.key_dim, bias=False)
        self.kv_down_proj = nn.Linear(d_model, config.kv_rank + config.rope_dim, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, config.latent_norm_eps)
        self.kv_up_proj = nn.Linear(config.kv_rank, H * (config.nope_dim + config.v_dim), bias=False)
        self.o_proj = nn.Linear(H * config.v_dim, d_model, bias=False)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: LatentState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
    ) -> MixerOutput[LatentState]:
        self.check_input(x, state, seqs)
        c = self.config
        q_input = x if c.q_rank is None else self.q_norm(self.q_down_proj(x))
        q = self.q_proj(q_input).unflatten(-1, (c.num_heads, c.key_dim))
        latent, shared = self.kv_down_proj(x).split([c.kv_rank, c.rope_dim], dim=-1)
        latent = self.kv_norm(latent)
        if c.rotate:
            positions = positions_of(x, state, seqs)
            q_nope, q_shared = q.split([c.nope_dim, c.rope_dim], dim=-1)
            q = torch.cat([q_nope, rotate(q_shared, positions, c.rope_theta)], dim=-1)
            shared = rotate(shared.unsqueeze(2), positions, c.rope_theta).squeeze(2)
        latents = torch.cat([latent, shared], dim=-1)
        past = 0
        if state is not None:
            past = state.tokens[0]
            state = LatentState(state.latents.append(latents))
            latents = state.latents.content
        # Expanding costs the past once a call, absorbing costs each query more: absorb when queries are few.
        largest = None
        if past and x.shape[1] * 8 <= past and not side:
            o = attended(
                lambda read: self._absorbed(q, read.squeeze(2)), [latents.unsqueeze(2)], [], queries=q
            )
        else:
            k, v = self._expanded(latents)
            largest = largest_logit(q, k, scale=c.key_dim**-0.5, seqs=seqs) if side else None
            o = causal_attention(q, k, v, scale=c.key_dim**-0.5, seqs=seqs)
        y = self.o_proj(o.flatten(-2))
        return (y, state, SideResults(largest)) if side else (y, state)

    def _expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, S, H, key_dim]` and values `[B, S, H, v_dim]` from the latents `[B, S, kv_rank + rope_dim]`."""
        c = self.config
        latent, shared = latents.split([c.kv_rank, c.rope_dim], dim=-1)
        kv = self.kv_up_proj(latent).unflatten(-1, (c.num_heads, c.nope_dim + c.v_dim))
        k_own, v = kv.split([c.nope_dim, c.v_dim], dim=-1)
        k = torch.cat([k_own, shared.unsqueeze(2).expand(-1, -1, c.num_heads, -1).to(k_own.dtype)], dim=-1)
        return k, v

    def _absorbed(self, q: Tensor, latents: Tensor) -> Tensor:
        """The same attention with all heads reading the latents themselves, as one shared key-value head."""
        c = self.config
        w_k, w_v = self._up_weights()
        q_own, q_shared = q.split([c.nope_dim, c.rope_dim], dim=-1)
        q = torch.cat([torch.einsum("bthn,hnr->bthr", q_own, w_k.to(q.dtype)), q_shared], dim=-1)
        keys = latents.to(q.dtype)
        B, T, S = q.shape[0], q.shape[1], keys.shape[1]
        # One product for all heads and tokens of a sequence: its rows read the cache once.
        logits = (q.flatten(1, 2) @ keys.mT).unflatten(1, (T, c.num_heads)) * c.key_dim**-0.5
        if T > 1:
            future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
            logits = logits.masked_fill(future[:, None], -torch.inf)
        weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        read = (weights.flatten(1, 2) @ keys[..., : c.kv_rank]).view(B, T, c.num_heads, c.kv_rank)
        return torch.einsum("bthr,hvr->bthv", read, w_v.to(q.dtype))

    def _up_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of each head that make keys `[H, nope_dim, kv_rank]` and values `[H, v_dim, kv_rank]`."""
        c = self.config
        up = self.kv_up_proj.weight.unflatten(0, (c.num_heads, c.nope_dim + c.v_dim))
        w_k, w_v = up.split([c.nope_dim, c.v_dim], dim=1)
        return w_k, w_v

    def init_state(self, batch_size: int) -> LatentState:
        shape = (batch_size, 0, self.config.kv_rank + self.config.rope_dim)
        return LatentState(GrowingTensor(empty_beside(self.kv_down_proj.weight, *shape)))

    def logit_scales(self, factor: Tensor) -> Iterator[RowScale]:
        # The shared key serves all heads and stays: own queries and keys take a root each, shared queries all.
        c = self.config
        own, shared = factor.sqrt()[:, None].expand(-1, c.nope_dim), factor[:, None].expand(-1, c.rope_dim)
        values = torch.ones_like(factor)[:, None].expand(-1, c.v_dim)
        yield RowScale(self.q_proj.weight, torch.cat([own, shared], dim=1).flatten())
        yield RowScale(self.kv_up_proj.weight, torch.cat([own, values], dim=1).flatten())

    def cost(self) -> Cost:
        c = self.config
        return Cost(
            parameters=sum(p.numel() for p in self.parameters()),
            projection_flops=2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)),
            # Each token looks at half of the sequence on average.
            mixing_flops=lambda length: c.num_heads * (c.key_dim + c.v_dim) * (length + 1),
            fixed_state_bytes=0,
            state_bytes_per_token=(c.kv_rank + c.rope_dim) * self.kv_down_proj.weight.element_size(),
        )
