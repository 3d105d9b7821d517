"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434), with or without positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState
from intarsia.layers.norm import RMSNorm
from intarsia.layers.packed import weights_of
from intarsia.layers.parted import Parted, Rows
from intarsia.layers.projections import weight_of
from intarsia.layers.qk_clip import ClipsLogits, RowScale
from intarsia.layers.rope import Yarn, positions_of, rotate
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.base import About, Layer, Mixer, MixerConfig, MixerOutput, positive
from intarsia.ops import PackedWeights, Sequences, latent_attention, pack_weights, softmax_attention
from intarsia.ops.attention import largest_logit
from intarsia.ops.keys import as_heads
from intarsia.ops.precision import widen
from intarsia.ops.row_program import Place, Product, RowProgram


@dataclass(frozen=True)
class MLAConfig(MixerConfig):
    """The options of MLA.

    Each head has `nope_dim` query-key channels of its own and shares `rope_dim` key channels with all others;
    `v_dim` value channels. Keys and values are made from a latent of `kv_rank` channels. `rotate` rotates the
    shared channels by position (DeepSeek); without it the layer knows no positions and the shared channels stay
    as they are (NoPE, Kimi Linear). `q_rank` makes the queries through a latent as well.

    `yarn` stretches the rotation to longer texts, and with it all logits are multiplied by
    `(0.1 yarn_logits ln factor + 1)²` (DeepSeek-V3's `mscale_all_dim`, which is 1 there). `head_gate` multiplies each
    head's output with a sigmoid of the input (Ling 3.0).
    """

    type: ClassVar[str] = "mla"
    about = About(
        title="Multi-head latent attention",
        year=2024,
        source="arXiv:2405.04434",
        family="softmax",
        equation="o_t = softmax(q_t [W_k c; k_shared]^T / sqrt(K)) W_v c",
        brought="keys and values are made from one small latent, which is all that is cached",
        operator="latent_attention",
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
    yarn: Yarn | None = None
    yarn_logits: float = 0.0
    head_gate: bool = False
    output_gate: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, kv_rank=self.kv_rank, nope_dim=self.nope_dim, v_dim=self.v_dim)
        positive(q_rank=self.q_rank, rope_theta=self.rope_theta, latent_norm_eps=self.latent_norm_eps)
        if self.rope_dim < 0 or (self.rotate and (self.rope_dim == 0 or self.rope_dim % 2)):
            raise ConfigError(f"rotate needs a positive even rope_dim; got {self.rope_dim}")
        if self.yarn is not None and not self.rotate:
            raise ConfigError("yarn stretches a rotation, and rotate is off")
        if self.yarn_logits < 0 or (self.yarn_logits and self.yarn is None):
            raise ConfigError(f"yarn_logits goes with yarn and is at least 0; got {self.yarn_logits}")

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        stretched = 0.0 if self.yarn is None else self.yarn_logits * max(0.0, math.log(self.yarn.factor))
        return self.key_dim**-0.5 * (0.1 * stretched + 1) ** 2

    @property
    def key_dim(self) -> int:
        """The query-key channels of a head."""
        return self.nope_dim + self.rope_dim

    def build(self, d_model: int, norm_eps: float = 1e-5) -> LatentAttention:
        return LatentAttention(d_model, self)


class LatentAttention(ClipsLogits, Mixer[GrowingState]):
    """MLA:

        c = rmsnorm(W x)            k_shared = W x            [k_h; v_h] = W_h c            q_h = W_h x
        y = W_o softmax([q_h; q_shared,h]ᵀ [k_h; k_shared] / sqrt(K)) v_h

    with `head_gate` or `output_gate` `y = W_o (sigmoid(W x)_h * softmax(…) v_h)`, a number or a vector for each head.

    The cache holds `c` and `k_shared` alone; `latent_attention` reads them without making keys and values of the past
    for a few queries.
    """

    reads_weights = ("kv_up_proj",)

    def __init__(self, d_model: int, config: MLAConfig) -> None:
        super().__init__(d_model)
        self.config = config
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
        self.head_gate_proj = nn.Linear(d_model, H, bias=False) if config.head_gate else None
        self.output_gate_proj = (
            nn.Linear(d_model, H * config.v_dim, bias=False) if config.output_gate else None
        )
        self.o_proj = nn.Linear(H * config.v_dim, d_model, bias=False)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: GrowingState | None = None,
        seqs: Sequences | None = None,
        side: tuple[SideName, ...] = (),
    ) -> MixerOutput[GrowingState]:
        self.check_input(x, state, seqs)
        c = self.config
        _, q, latents = self._projected(x, positions_of(x, state, seqs) if c.rotate else None)
        scale, largest = c.scale, None
        if state is None or side:
            k, v = self._expanded(latents)
            largest = largest_logit(q, k, scale=scale, seqs=seqs) if side else None
        if state is None:
            o = softmax_attention(q, k, v, scale=scale, cu_seqlens=seqs)
        else:
            grown = state.grow(x, seqs)
            (read,) = grown.append(latents=latents)
            state = grown.end()
            o = latent_attention(q, read, self._up(), scale=scale, cu_seqlens=seqs)
        y = self._finished(o, x)
        return (y, state, SideResults(largest)) if side else (y, state)

    def _projected(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What queries are made of `[B, T, q_rank or D]`, the queries `[B, T, H, K]`, and the latents `[B, T, kv_rank +
        rope_dim]`; rotated where there are positions."""
        c = self.config
        q_input = x if c.q_rank is None else self.q_norm(self.q_down_proj(x))
        q = self.q_proj(q_input).unflatten(-1, (c.num_heads, c.key_dim))
        latent, shared = self.kv_down_proj(x).split([c.kv_rank, c.rope_dim], dim=-1)
        latent = self.kv_norm(latent)
        if positions is not None:
            q_nope, q_shared = q.split([c.nope_dim, c.rope_dim], dim=-1)
            q = torch.cat([q_nope, rotate(q_shared, positions, c.rope_theta, c.yarn)], dim=-1)
            shared = rotate(shared.unsqueeze(2), positions, c.rope_theta, c.yarn).squeeze(2)
        return q_input, q, torch.cat([latent, shared], dim=-1)

    def _up(self) -> Tensor:
        """The weights that make keys and values of latents, `[H, nope_dim + v_dim, kv_rank]`."""
        c = self.config
        return weight_of(self.kv_up_proj, c.kv_rank).unflatten(0, (c.num_heads, -1))

    def _finished(self, o: Tensor, x: Tensor) -> Tensor:
        """The layer's output, of what its heads have found `[B, T, H, V]`."""
        if self.head_gate_proj is not None:
            o = _gated(o, self.head_gate_proj(x))
        o = o.flatten(-2)
        if self.output_gate_proj is not None:
            o = o * torch.sigmoid(widen(self.output_gate_proj(x))).to(o.dtype)
        y: Tensor = self.o_proj(o)
        return y

    def _expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of each head, made from latents `[B, T, kv_rank + rope_dim]`."""
        c = self.config
        latent, shared = latents.split([c.kv_rank, c.rope_dim], dim=-1)
        kv = self.kv_up_proj(latent).unflatten(-1, (c.num_heads, c.nope_dim + c.v_dim))
        k_own, v = kv.split([c.nope_dim, c.v_dim], dim=-1)
        shared = shared.unsqueeze(2).expand(-1, -1, c.num_heads, -1)
        return torch.cat([k_own, shared.to(k_own.dtype)], dim=-1), v

    def for_inference(self) -> Layer[GrowingState]:
        ready = AbsorbedAttention(self)
        if ready.parts:
            return ready
        layer: Layer[GrowingState] = self
        return layer

    @property
    def memory(self) -> GrowingMemory:
        """The compressed keys-and-values after their norm, then the key part that all heads share, rotated already
        where it is rotated."""
        return GrowingMemory("latent", {"latents": Entry((self.config.kv_rank + self.config.rope_dim,))})

    def logit_scales(self, factor: Tensor) -> Iterator[RowScale]:
        # The shared key serves all heads and stays: own queries and keys take a root each, shared queries all.
        c = self.config
        own, shared = factor.sqrt()[:, None].expand(-1, c.nope_dim), factor[:, None].expand(-1, c.rope_dim)
        values = torch.ones_like(factor)[:, None].expand(-1, c.v_dim)
        yield RowScale(self.q_proj.weight, torch.cat([own, shared], dim=1).flatten())
        yield RowScale(self.kv_up_proj.weight, torch.cat([own, values], dim=1).flatten())

    def mixing_flops(self, length: int) -> float:
        c = self.config
        return softmax_attention_flops(c.num_heads, c.key_dim, c.v_dim, length)


class AbsorbedAttention(Parted):
    """MLA made ready for a few tokens: their queries are brought to the latents, which all heads read as they are
    cached, by matrices of each head's own that lie in the order in which they are read."""

    def __init__(self, layer: LatentAttention) -> None:
        self.layer = layer
        up = weights_of(layer.kv_up_proj)
        if up is not None:
            c = layer.config
            w_k, w_v = up.data.unflatten(0, (c.num_heads, -1)).split([c.nope_dim, c.v_dim], dim=1)
            self._to_latents, self._of_latents = pack_weights(w_k.mT, up.format), pack_weights(w_v, up.format)
        self._found = up is not None

    def __call__(
        self, x: Tensor, state: GrowingState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, GrowingState | None]:
        y, state = self.layer(x, state, seqs)
        return y, state

    @property
    def parts(self) -> bool:
        layer = self.layer
        if (
            layer.output_gate_proj is not None
        ):  # of the values, which are made where nothing else of a token is known
            return False
        first = layer.q_proj if layer.config.q_rank is None else layer.q_down_proj
        gate = () if layer.head_gate_proj is None else (layer.head_gate_proj,)
        maps = (first, layer.q_proj, layer.kv_down_proj, layer.o_proj, *gate)
        return self._found and all(weights_of(each) is not None for each in maps)

    @property
    def beside(self) -> tuple[PackedWeights, ...]:
        return (self._to_latents, self._of_latents) if self._found else ()

    def begin(self, program: RowProgram, x: Place) -> None:
        layer, c = self.layer, self.layer.config
        size = c.kv_rank + c.rope_dim
        latents, wide = program.result(size), program.result(c.num_heads * size)
        others, q = [Product(x, _weights(layer.kv_down_proj), latents)], program.room(c.num_heads * c.key_dim)
        if layer.head_gate_proj is not None:
            others.append(Product(x, _weights(layer.head_gate_proj), program.result(c.num_heads)))
        if c.q_rank is None:
            program.products([Product(x, _weights(layer.q_proj), q), *others])
        else:
            q_latent = program.room(c.q_rank)
            program.products([Product(x, _weights(layer.q_down_proj), q_latent), *others])
            program.norm(q_latent, layer.q_norm.weight, layer.q_norm.eps, to=q_latent)
            program.products([Product(q_latent, _weights(layer.q_proj), q)])
        latent = latents.columns(0, c.kv_rank)
        program.norm(latent, layer.kv_norm.weight, layer.kv_norm.eps, to=latent)
        program.product_of_each(q, self._to_latents, wide, x_step=c.key_dim, to_step=size)
        if c.rope_dim:
            shared, to = (
                q.columns(c.nope_dim, q.width - c.nope_dim),
                wide.columns(c.kv_rank, wide.width - c.kv_rank),
            )
            program.copy(shared, to, c.rope_dim, c.num_heads, x_step=c.key_dim, to_step=size)

    def exchange(
        self, rows: Rows, shape: tuple[int, int], state: GrowingState, seqs: Sequences | None
    ) -> tuple[Tensor, GrowingState]:
        c = self.layer.config
        latents, q, *gate = (x.unflatten(0, shape) for x in rows)
        q = q.unflatten(-1, (c.num_heads, -1))
        if c.rotate:
            positions = positions_of(latents, state, seqs)
            for x in (q[..., c.kv_rank :], latents[..., None, c.kv_rank :]):
                x.copy_(rotate(x, positions, c.rope_theta, c.yarn))
        grown = state.grow(latents, seqs)
        (read,) = grown.append(latents=latents)
        keys, values = as_heads(read), as_heads(read, c.kv_rank)
        o = softmax_attention(q, keys, values, scale=c.scale, cu_seqlens=seqs)
        # What is found in the latents may be gated as well as the values that are made of it.
        o = _gated(o, gate[0]) if gate else o
        return o.flatten(0, 1).flatten(1), grown.end()

    def finish(self, program: RowProgram) -> Place:
        c = self.layer.config
        found, o = program.input(c.num_heads * c.kv_rank), program.room(c.num_heads * c.v_dim)
        program.product_of_each(found, self._of_latents, o)
        return program.product(o, _weights(self.layer.o_proj))


def _gated(o: Tensor, gate: Tensor) -> Tensor:
    """Heads `[B, T, H, V]` times the sigmoid of `[B, T, H]`."""
    return o * torch.sigmoid(widen(gate)).to(o.dtype).unsqueeze(-1)


def _weights(module: nn.Linear) -> PackedWeights:
    weights = weights_of(module)
    assert weights is not None
    return weights
