"""DeltaFormer: the delta rule in the memory of softmax attention (Zhong et al. 2025, arXiv:2505.19488)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import CHUNK, softmax_attention_flops
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState, each_sequence, laid_out
from intarsia.layers.projections import linear
from intarsia.layers.rope import positions_of, rotate
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences, softmax_attention
from intarsia.ops.blockwise import Blockwise, recomputed, strict_inverse
from intarsia.ops.finite import attended
from intarsia.ops.keys import Keys
from intarsia.ops.precision import compute_dtype, widen, without_autocast


@dataclass(frozen=True)
class DeltaFormerConfig(MixerConfig):
    """The options of DeltaFormer: `num_heads` heads of `head_dim` for queries, keys and values.

    What is erased is read with the token's key (`erase="key"`) or with a projection of its own (`erase="own"`),
    and taken off as it is (`strength="one"`, the paper) or times `W x + b` (`strength="linear"`, the authors' code,
    which bounds it by nothing). `rope` rotates queries and keys by position, what is read with included.
    """

    type: ClassVar[str] = "deltaformer"
    about = About(
        title="DeltaFormer",
        year=2025,
        source="arXiv:2505.19488",
        family="softmax",
        equation="u_t = v_t - sum_{j<t} softmax_j(k_t k_j) u_j, o_t = softmax(q_t K^T) U",
        brought="attention that erases: a value replaces what was kept under similar keys",
        operator="deltaformer",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_heads: int
    head_dim: int
    erase: Literal["key", "own"] = "key"
    strength: Literal["one", "linear"] = "one"
    rope: bool = True
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim, rope_theta=self.rope_theta)
        if self.erase not in ("key", "own"):
            raise ConfigError(f"erase must be 'key' or 'own'; got {self.erase!r}")
        if self.strength not in ("one", "linear"):
            raise ConfigError(f"strength must be 'one' or 'linear'; got {self.strength!r}")
        if self.rope and self.head_dim % 2:
            raise ConfigError(f"rope rotates pairs of channels: head_dim must be even; got {self.head_dim}")

    def build(self, d_model: int, norm_eps: float = 1e-5) -> DeltaFormer:
        return DeltaFormer(d_model, self)


def erased_values(
    e: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, past: Tensor | None = None, *, scale: float
) -> Tensor:
    """`u_t = v_t - beta_t sum_{j < t} softmax_{j < t}(e_t k_j scale) u_j`; the first token erases nothing.

    A chunk of tokens at a time: with P the softmax times beta, `(I + P_own) u = v - P_before u_before`, a unit lower
    triangular system of the chunk's size. Memory: a chunk's logits, `[C, S]`, beside inputs and outputs.

    Args:
        e: `[B, T, H, K]`, the last T of S tokens.
        k: `[B, S, H, K]`.
        v: `[B, T, H, V]`; beta: `[B, T, H]`, None for one.
        past: `[B, S - T, H, V]`, u of the tokens before.

    Returns:
        `[B, T, H, V]`, float32 (float64 for float64), in which all is computed.
    """
    # Of the tokens that a token reads, one that is not finite spoils all that come after it: so do e and beta.
    keys = [e, k] if beta is None else [e, k, beta]

    def erase(e: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        *strength, v = rest
        return _in_chunks(e, k, v, *strength, past=past, scale=scale)

    return attended(erase, keys, [v], queries=e)


def _in_chunks(
    e: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, *, past: Tensor | None, scale: float
) -> Tensor:
    def of_chunk(e: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, *before: Tensor) -> Tensor:
        C, S = e.shape[2], k.shape[2]
        own = torch.ones(C, S, dtype=torch.bool, device=e.device).triu(S - C)
        # A row without keys would have no softmax: the first token's is made of all, and then cleared with the rest.
        hidden = own & (torch.arange(S - C, S, device=e.device) > 0)[:, None]
        logits = scale * (e @ k.mT)
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(own, 0)
        p = p if beta is None else beta[..., None] * p
        if before:
            v = v - p[..., : S - C] @ torch.cat(before, dim=2)
        return strict_inverse(p[..., S - C :]) @ v

    T, seen = e.shape[1], k.shape[1] - e.shape[1]
    e, k, v = (widen(x).transpose(1, 2) for x in (e, k, v))
    beta = None if beta is None else widen(beta).transpose(1, 2)
    parts = [] if past is None else [widen(past).transpose(1, 2)]
    given = len(parts)
    with without_autocast(e):
        for start in range(0, T, CHUNK):
            end = min(start + CHUNK, T)
            rows = slice(start, end)
            strength = None if beta is None else beta[:, :, rows]
            keys = k[:, :, : seen + end]
            parts.append(recomputed(of_chunk, e[:, :, rows], keys, v[:, :, rows], strength, *parts))
    return torch.cat(parts[given:], dim=2).transpose(1, 2)


def _erased_values(e: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, scale: float) -> Tensor:
    return erased_values(e, k, v, beta, scale=scale)


_ERASED_VALUES = Blockwise(
    "erased_values", 4, _erased_values, lambda x: x[2].new_empty(x[2].shape, dtype=compute_dtype(x[0]))
)


class DeltaFormer(Mixer[GrowingState]):
    """`u` of `erased_values`, then softmax attention over it: `y = W_o softmax(q kᵀ / sqrt(K)) u`.

    `u_t = v_t - sum_{j < t} kappa(w_t, k_j) u_j` is the paper's rule for a kernel kappa: a memory `S = sum_j u_j
    phi(k_j)ᵀ` whose answer to `w_t` is taken off before `v_t` is written. Here kappa is softmax over the tokens
    before, with the same 1 / sqrt(K) as for reading, as in the authors' code.

    Differences from the authors' code: the strength is one by default; u is kept and solved for in float32. In
    flash-linear-attention's layer the strength is linear, heads may be grouped, and queries and keys be normed.
    """

    def __init__(self, d_model: int, config: DeltaFormerConfig) -> None:
        super().__init__(d_model)
        self.config = config
        H, K = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * K, bias=False)
        self.e_proj = nn.Linear(d_model, H * K, bias=False) if config.erase == "own" else None
        self.beta_proj = linear(d_model, H, bias=True) if config.strength == "linear" else None
        self.o_proj = nn.Linear(H * K, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GrowingState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, GrowingState | None]:
        self.check_input(x, state, seqs)
        heads, scale = (self.config.num_heads, self.config.head_dim), self.config.head_dim**-0.5
        positions = positions_of(x, state, seqs)

        def project(proj: nn.Module) -> Tensor:
            y = proj(x).unflatten(-1, heads)
            return rotate(y, positions, self.config.rope_theta) if self.config.rope else y

        q, k = project(self.q_proj), project(self.k_proj)
        e = k if self.e_proj is None else project(self.e_proj)
        v = self.v_proj(x).unflatten(-1, heads)
        beta = None if self.beta_proj is None else self.beta_proj(x)
        keys: Keys = k
        values: Keys
        if state is None:
            values = _ERASED_VALUES(seqs, (e, k, v, beta), scale)
        else:
            grown = state.grow(x, seqs)
            (keys,) = grown.append(keys=k)

            def erase(e: Tensor, v: Tensor, beta: Tensor | None, k: Tensor, past: Tensor) -> Tensor:
                return erased_values(e, k, v, beta, past, scale=scale)

            own = each_sequence(erase, seqs, (e, v, beta), (keys, grown.before("erased_values")))
            (values,) = grown.append(erased_values=laid_out(own, seqs))
            state = grown.end()
        o = softmax_attention(q, keys, values, scale=scale, cu_seqlens=seqs)
        return self.o_proj(o.flatten(-2)), state

    @property
    def memory(self) -> GrowingMemory:
        """Keys, and the values with what was erased taken off."""
        heads = (self.config.num_heads, self.config.head_dim)
        return GrowingMemory("growing", {"keys": Entry(heads), "erased_values": Entry(heads, "wide")})

    def mixing_flops(self, length: int) -> float:
        H, K = self.config.num_heads, self.config.head_dim
        # Once to erase and once to read.
        return 2 * softmax_attention_flops(H, K, K, length)
