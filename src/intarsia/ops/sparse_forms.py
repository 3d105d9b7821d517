"""What the forms of sparse attention share: latents are keys that all heads have in common, and sequences whose keys
lie apart are worked on one by one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from intarsia.ops.absorbed import absorbed
from intarsia.ops.attention_call import queries_of
from intarsia.ops.keys import Keys, as_heads, row_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import SparseCall, SparseLatentCall


class Attend(Protocol):
    """Attention to what was picked. Without values they are the first `rank` channels of the keys."""

    def __call__(
        self,
        q: Tensor,
        k: Keys,
        v: Keys | None,
        rank: int,
        picked: Tensor,
        block: int,
        scale: float,
        seqs: Sequences | None,
    ) -> Tensor: ...


def to_keys(call: SparseCall, attend: Attend) -> Tensor:
    """Sparse attention, `[B, T, H, V]` in the dtype of q."""
    dense = call.dense
    return attend(dense.q, dense.k, dense.v, 0, call.picked, call.block, dense.scale, dense.seqs)


def to_latents(call: SparseLatentCall, attend: Attend) -> Tensor:
    """The same of latents."""
    dense = call.dense
    keys = as_heads(dense.latents)

    def read(wide: Tensor) -> Tensor:
        return attend(wide, keys, None, dense.rank, call.picked, call.block, dense.scale, dense.seqs)

    return absorbed(dense.q, dense.up, dense.own, read)


def one_by_one(
    attend: Attend,
    q: Tensor,
    k: Keys,
    v: Keys | None,
    rank: int,
    picked: Tensor,
    block: int,
    scale: float,
    seqs: Sequences | None,
) -> Tensor:
    """Each sequence by itself."""
    parts = dict(queries_of(picked, seqs))
    found = [
        attend(part, row_of(k, n), None if v is None else row_of(v, n), rank, parts[n], block, scale, None)
        for n, part in queries_of(q, seqs)
    ]
    return torch.cat(found, dim=0 if seqs is None else 1)
