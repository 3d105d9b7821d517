"""Latents that all heads read themselves, as one shared key head; keys and values are never made of them (MLA)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intarsia.ops.widened import einsum


def absorbed(q: Tensor, up: Tensor, own: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention in which the maps from latents to keys and values are taken into queries and outputs: `q_hᵀ W_h c` is
    `(W_hᵀ q_h)ᵀ c`.

    Args:
        q: `[B, T, H, own + shared]`.
        up: `[H, own + V, rank]`, from a latent to a head's keys and values.
        own: the query-key channels that each head has of its own.
        attend: from queries `[B, T, H, rank + shared]` to what each finds among the latents, `[B, T, H, rank]`.

    Returns:
        `[B, T, H, V]`.
    """
    w_k, w_v = up.to(q.dtype).split([own, up.shape[1] - own], dim=1)
    q_own, q_shared = q.split([own, q.shape[3] - own], dim=-1)
    wide = torch.cat([einsum("bthn,hnr->bthr", q_own, w_k), q_shared], dim=-1)
    return einsum("bthr,hvr->bthv", attend(wide), w_v)
