"""Latent attention in PyTorch: expanded to keys and values, or absorbed into the queries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from intarsia.ops.absorbed import absorbed
from intarsia.ops.attention_call import AttentionCall, LatentCall
from intarsia.ops.attention_torch import attention_torch, by_sequence, in_blocks, shown, visible
from intarsia.ops.choice import Implementation
from intarsia.ops.finite import attended
from intarsia.ops.keys import lengths_of, right_aligned, row_of
from intarsia.ops.widened import linear

MANY = 8
"""Expanding costs the past once a call, absorbing costs each query more: absorbed is what looks at so many tokens of
the past for each query."""

LOGITS = 1 << 23
"""So many are made at a time, or those of one query."""


def latent_torch(call: LatentCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    q, latents = call.q, call.latents
    if isinstance(latents, Tensor):
        return _dense(call, q, latents)

    def alone(n: int, q: Tensor) -> Tensor:
        return _dense(replace(call, seqs=None), q, row_of(latents, n))

    def together(numbers: list[int], q: Tensor, size: int) -> Tensor:
        mask = shown(q.shape[1], [lengths_of(latents)[n] for n in numbers], None, q.device)
        return _absorbed(call, q, right_aligned(latents, numbers, size), mask[:, 0])

    return by_sequence(q, call.seqs, latents, alone, together)


def expanded(call: LatentCall, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The keys `[B, S, H, K]` and values `[B, S, H, V]` that latents `[B, S, rank + shared]` stand for."""
    H, own = call.q.shape[2], call.own
    latent, shared = latents.split([call.rank, latents.shape[-1] - call.rank], dim=-1)
    kv = linear(latent, call.up.flatten(0, 1)).unflatten(-1, (H, -1))
    k_own, v = kv.split([own, kv.shape[-1] - own], dim=-1)
    return torch.cat([k_own, shared.unsqueeze(2).expand(-1, -1, H, -1).to(k_own.dtype)], dim=-1), v


def _dense(call: LatentCall, q: Tensor, latents: Tensor) -> Tensor:
    T, S = q.shape[1], latents.shape[1]
    if T < S and T * MANY <= S - T:
        rows = max(LOGITS // (q.shape[0] * q.shape[2] * S), 1)

        def block(begin: int, end: int) -> Tensor:
            seen = latents[:, : S - T + end]
            mask = visible(end - begin, seen.shape[1], None, q.device) if end - begin > 1 else None
            return _absorbed(call, q[:, begin:end], seen, mask)

        return in_blocks(block, T, rows)
    k, v = expanded(call, latents)
    return attention_torch(AttentionCall(q, k, v, call.scale, None, None, None, call.seqs))


def _absorbed(call: LatentCall, q: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
    """All heads read the latents themselves, as one shared key-value head.

    `mask` `[T, S]` or `[B, T, S]` shows what each query sees; None: everything.
    """
    rank = call.rank

    def attend(read: Tensor) -> Tensor:
        keys = read.squeeze(2).to(q.dtype)

        def find(wide: Tensor) -> Tensor:
            B, T, H = wide.shape[:3]
            # One product for all heads and tokens of a sequence: its rows read the cache once.
            logits = (wide.flatten(1, 2) @ keys.mT).unflatten(1, (T, H)) * call.scale
            if mask is not None:
                logits = logits.masked_fill(~mask[..., None, :], -torch.inf)
            weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(
                q.dtype
            )
            return (weights.flatten(1, 2) @ keys[..., :rank]).view(B, T, H, rank)

        return absorbed(q, call.up, call.own, find)

    return attended(attend, [latents.unsqueeze(2)], [], queries=q)


IMPLEMENTATION = Implementation("torch", latent_torch)
