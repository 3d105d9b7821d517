"""PaTH attention: positions by products of Householder-like maps (Yang et al. 2025, arXiv:2505.16381)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.flops import CHUNK, keys_seen
from intarsia.layers.growing import Entry, GrowingMemory, GrowingState, each_sequence, laid_out
from intarsia.layers.projections import linear, low_rank
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences, cumulative_log_gate, l2norm
from intarsia.ops.blockwise import Blockwise, recomputed, strict_inverse
from intarsia.ops.finite import attended
from intarsia.ops.precision import widen, without_autocast


@dataclass(frozen=True)
class PathConfig(MixerConfig):
    """The options of PaTH attention: `num_heads` heads of `head_dim` for queries, keys and values.

    The direction w of each token's map comes from a projection through `w_rank` channels (None: a plain one) and a
    short convolution over `conv_size` tokens (None: without). `forget_gate` adds the gate of forgetting attention
    (PaTH-FoX).
    """

    type: ClassVar[str] = "path"
    about = About(
        title="PaTH attention",
        year=2025,
        source="arXiv:2505.16381",
        family="softmax",
        equation="o_t = sum_j softmax_j(k_j (H_{j+1} .. H_t) q_t) v_j, H = I - b w w^T",
        brought="positions that depend on what stands between two tokens: it can track states",
        operator="path_attention",
        example={"num_heads": 8, "head_dim": 128},
    )
    num_heads: int
    head_dim: int
    w_rank: int | None = 32
    conv_size: int | None = 3
    forget_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            num_heads=self.num_heads, head_dim=self.head_dim, w_rank=self.w_rank, conv_size=self.conv_size
        )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> PathAttention:
        return PathAttention(d_model, self)


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    c: Tensor | None,
    past: Tensor | None = None,
    *,
    scale: float,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`o_i = sum_{j <= i} softmax_j(scale k_jᵀ H_{j+1} .. H_i q_i + c_i - c_j) v_j`, `H_t = I - beta_t w_t w_tᵀ`.

    A chunk of C tokens at a time. Within one, `H_C .. H_1 = I - Wᵀ U` with `U = (I + tril(beta W Wᵀ, -1))^-1 beta W`
    (the UT transform), and what stands between two tokens is a corner of the same inverse. All keys before
    the chunk are held as they look from its beginning: behind each chunk they are multiplied by its map, as at
    decoding, which costs about what their logits cost. No `[T, T, K]` is made: beside inputs and outputs there
    are a chunk's logits `[C, S]`, and for a backward pass the keys at the beginning of each chunk,
    `S² K / 2 C` numbers a head.

    Args:
        q: `[B, T, H, K]`, the last T of S tokens.
        k, w: `[B, T, H, K]`, of the T tokens; beta `[B, T, H]`.
        v: `[B, S, H, V]`; c: `[B, S, H]`, the cumulative log gate in float64, or None.
        past: `[B, S - T, H, K]`, the keys before, multiplied by the maps of all tokens up to the last of them.
        keep: whether to return the keys multiplied by the maps of all tokens behind them, `[B, S, H, K]`.

    Returns:
        `[B, T, H, V]` in the dtype of q, and the keys, float32 (float64 for float64), in which all is computed.
    """
    advanced: list[Tensor | None] = []

    def attend(k: Tensor, w: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
        *gate, v = rest
        o, keys = _in_chunks(q, k, v, w, beta, *gate, past=past, scale=scale, keep=keep)
        advanced.append(keys)
        return o

    o = attended(attend, [k, w, beta] if c is None else [k, w, beta, c], [v], queries=q)
    return o, advanced[0]


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    c: Tensor | None = None,
    *,
    past: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    def of_chunk(
        past: Tensor, q: Tensor, k: Tensor, w: Tensor, beta: Tensor, v: Tensor, c: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        C, S = q.shape[2], v.shape[2]
        inverse = strict_inverse(beta[..., None] * (w @ w.mT)) * beta[..., None, :]
        u = inverse @ w
        before_key = inverse @ (w @ k.mT).tril(-1)
        upto_query = (q @ w.mT).tril()
        own = q @ k.mT - upto_query @ before_key
        logits = scale * torch.cat([(q - upto_query @ u) @ past.mT, own], dim=-1)
        if c is not None:
            logits = logits + (c[:, :, S - C :, None] - c[:, :, None, :]).to(q.dtype)
        future = torch.ones(C, S, dtype=torch.bool, device=q.device).triu(S - C + 1)
        o = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        if not keep:
            return o, None
        return o, torch.cat([past - past @ (u.mT @ w), k - before_key.mT @ w], dim=2)

    T, seen = q.shape[1], v.shape[1] - q.shape[1]
    heads_first = [widen(x).transpose(1, 2) for x in (q, k, w, beta)]
    values, gates = widen(v).transpose(1, 2), None if c is None else c.transpose(1, 2)
    keys = heads_first[1][:, :, :0] if past is None else widen(past).transpose(1, 2)
    outputs = []
    with without_autocast(q):
        for start in range(0, T, CHUNK):
            end = min(start + CHUNK, T)
            o, advanced = recomputed(
                of_chunk,
                keys,
                *(x[:, :, start:end] for x in heads_first),
                values[:, :, : seen + end],
                None if gates is None else gates[:, :, : seen + end],
                keep or end < T,
            )
            outputs.append(o)
            keys = keys if advanced is None else advanced
    o = torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype)
    return o, keys.transpose(1, 2) if keep else None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, c: Tensor | None, scale: float
) -> Tensor:
    return path_attention(q, k, v, w, beta, c, scale=scale)[0]


_ATTENTION = Blockwise(
    "path_attention", 6, _attention, lambda x: x[0].new_empty(*x[0].shape[:3], x[2].shape[3])
)


class PathAttention(Mixer[GrowingState]):
    """`y = W_o o` with `o` of `path_attention`.

    w = l2norm(silu(conv(W x))) of each head    beta = 2 sigmoid(W x + b)    forget gate = sigmoid(W x + b)

    Differences from the authors' code: w and the maps are float32 and never rounded to 16 bits, nor are the
    cached keys, which every token multiplies anew; the bias of PaTH-FoX is added as it is, as in forgetting attention,
    where theirs divides it by sqrt(K) together with the logits.
    """

    def __init__(self, d_model: int, config: PathConfig) -> None:
        super().__init__(d_model)
        self.config = config
        H, K = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * K, bias=False)
        self.w_proj = low_rank(d_model, H * K, config.w_rank)
        self.conv = None if config.conv_size is None else ShortConvolution(H * K, config.conv_size)
        self.beta_proj = linear(d_model, H, bias=True)
        self.f_proj = linear(d_model, H, bias=True) if config.forget_gate else None
        self.o_proj = nn.Linear(H * K, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GrowingState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, GrowingState | None]:
        self.check_input(x, state, seqs)
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        w, tail = self.w_proj(x), None
        if self.conv is not None:
            w, tail = self.conv(w, None if state is None else state.fixed("conv"), seqs)
        w = l2norm(widen(w).unflatten(-1, heads))
        beta = 2 * torch.sigmoid(widen(self.beta_proj(x)))
        c = None
        if self.f_proj is not None:
            before = None if state is None else state.last("log_gate")
            c = cumulative_log_gate(F.logsigmoid(widen(self.f_proj(x))), before, seqs)
        scale = self.config.head_dim**-0.5
        if state is None:
            o = _ATTENTION(seqs, (q, k, v, w, beta, c), scale)
            return self.o_proj(o.flatten(-2)), None
        grown = state.grow(x, seqs)
        (values,) = grown.append(values=v)
        gate = None if c is None else grown.append(log_gate=c)[0]

        def attend(
            q: Tensor, k: Tensor, w: Tensor, beta: Tensor, v: Tensor, c: Tensor | None, past: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            return path_attention(q, k, v, w, beta, c, past, scale=scale, keep=True)

        found = each_sequence(attend, seqs, (q, k, w, beta), (values, gate, grown.before("keys")))
        # Every token multiplies all keys anew.
        grown.rewrite("keys", [None if each is None else each[1] for each in found])
        if tail is not None:
            grown.fix("conv", tail)
        o = laid_out([None if each is None else each[0] for each in found], seqs)
        return self.o_proj(o.flatten(-2)), grown.end()

    @property
    def memory(self) -> GrowingMemory:
        """Values, the keys as they look from behind the last token, the sums of the log gates where there are gates; of
        the short convolution its last inputs."""
        heads = (self.config.num_heads, self.config.head_dim)
        growing = {"values": Entry(heads), "keys": Entry(heads, "wide")}
        if self.config.forget_gate:
            growing["log_gate"] = Entry(heads[:1], torch.float64)
        fixed = {}
        if self.conv is not None:
            channels, size = self.conv.weight.shape
            fixed["conv"] = Entry((size - 1, channels), "wide")
        return GrowingMemory("growing", growing, fixed, rewritten=("keys",))

    def mixing_flops(self, length: int) -> float:
        H, K, C = self.config.num_heads, self.config.head_dim, CHUNK
        # For each pair of tokens the logit, the output and, once a chunk, the key's map; for each token the
        # chunk's maps: six products of C K, three of C C (the inverse one of them), one of K K.
        pair = 4 * K + 2 * K * K / C
        return H * (pair * keys_seen(length) + min(C, length) * (12 * K + 6 * min(C, length)) + 2 * K * K)
