"""The arguments of softmax attention, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.keys import Keys, count_of, entry_of, lengths_of
from intarsia.ops.sequences import Sequences


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of softmax attention; `softmax_attention` says what they are."""

    q: Tensor
    k: Keys
    v: Keys
    scale: float
    window: int | None
    sinks: Tensor | None
    log_gate: Keys | None
    seqs: Sequences | None


@dataclass(frozen=True)
class LatentCall:
    """The arguments of one call of latent attention; `latent_attention` says what they are."""

    q: Tensor
    latents: Keys
    up: Tensor
    scale: float
    seqs: Sequences | None

    @property
    def rank(self) -> int:
        """The channels of a latent that keys and values are made from."""
        return self.up.shape[2]

    @property
    def own(self) -> int:
        """The query-key channels that each head has of its own."""
        return self.q.shape[3] - (entry_of(self.latents).shape[-1] - self.rank)


def attention_call(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    log_gate: Keys | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> AttentionCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
        ConfigError: a window without a token.
    """
    _check_queries(q)
    seqs = sequences_in(q, cu_seqlens)
    H, K = q.shape[2:]
    entries = {"k": k, "v": v} if log_gate is None else {"k": k, "v": v, "log_gate": log_gate}
    for name, each in entries.items():
        _check_keys(name, each, q, seqs, 1 if name == "log_gate" else 2)
        if lengths_differ(each, k):
            raise ShapeError(
                f"{name} must have an entry for each of k: {lengths_of(each)} and {lengths_of(k)}"
            )
    HKV = entry_of(k).shape[2]
    if entry_of(k).shape[3] != K:
        raise ShapeError(f"k must have the {K} channels of q; got {list(entry_of(k).shape)}")
    if entry_of(v).shape[2] != HKV:
        raise ShapeError(f"v must have the {HKV} heads of k; got {list(entry_of(v).shape)}")
    if HKV == 0 or H % HKV:
        raise ShapeError(f"the query heads must be a multiple of the key heads: {H} is not one of {HKV}")
    if log_gate is not None and entry_of(log_gate).shape[2] != H:
        raise ShapeError(f"log_gate must have the {H} heads of q; got {list(entry_of(log_gate).shape)}")
    if sinks is not None and sinks.shape != (H,):
        raise ShapeError(f"sinks must be [H] = {[H]}; got {list(sinks.shape)}")
    if window is not None and window < 1:
        raise ConfigError(f"a token sees itself at least: window must be positive; got {window}")
    return AttentionCall(q, k, v, K**-0.5 if scale is None else scale, window, sinks, log_gate, seqs)


def latent_call(
    q: Tensor,
    latents: Keys,
    up: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
) -> LatentCall:
    """Check the shapes, dtypes and devices of a call. Errors as `attention_call`."""
    _check_queries(q)
    seqs = sequences_in(q, cu_seqlens)
    _check_keys("latents", latents, q, seqs, 1)
    H, K = q.shape[2:]
    shared = entry_of(latents).shape[-1] - up.shape[-1]
    if up.dim() != 3 or up.shape[0] != H or not 0 <= shared <= K or up.shape[1] <= K - shared:
        raise ShapeError(
            f"up must be [H, K - shared + V, rank] with H = {H}, K = {K} and rank + shared = "
            f"{entry_of(latents).shape[-1]}, the channels of the latents; got {list(up.shape)}"
        )
    return LatentCall(q, latents, up, K**-0.5 if scale is None else scale, seqs)


def lengths_differ(a: Keys, b: Keys) -> bool:
    """Whether two kinds of entries are not of the same tokens."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape[:2] != b.shape[:2]
    return lengths_of(a) != lengths_of(b)


def queries_of(q: Tensor, seqs: Sequences | None) -> Iterator[tuple[int, Tensor]]:
    """The number and the queries `[1, T_n, H, K]` of each sequence that has any."""
    parts = q.split(1) if seqs is None else q.split(seqs.lengths, dim=1)
    return ((n, part) for n, part in enumerate(parts) if part.shape[1])


def _check_queries(q: Tensor) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ShapeError(f"q must be [B, T, H, K], floating point; got {list(q.shape)} {q.dtype}")
    if min(q.shape) == 0:
        raise ShapeError(f"q needs at least one element; got {list(q.shape)}")


def sequences_in(q: Tensor, cu_seqlens: Tensor | Sequences | None) -> Sequences | None:
    """The sequences that are packed in a row of queries, checked; None where it is a batch, or holds one alone."""
    if cu_seqlens is None:
        return None
    seqs = Sequences.from_cu_seqlens(cu_seqlens)
    if q.shape[0] != 1 or seqs.total != q.shape[1]:
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); q is {list(q.shape)}"
        )
    # A row of one sequence is a batch of one.
    return None if seqs.count == 1 else seqs


def _check_keys(name: str, keys: Keys, q: Tensor, seqs: Sequences | None, dims: int) -> None:
    """Raise ShapeError unless these are entries of `dims` dimensions for the sequences of q."""
    shape = f"[B, S, {'heads, dim' if dims == 2 else 'channels'}]"
    if isinstance(keys, tuple):
        if not keys or not all(isinstance(x, Tensor) for x in keys):
            raise ShapeError(
                f"{name} of several sequences are a tensor of each; got {[type(x).__name__ for x in keys]}"
            )
        odd = next((x for x in keys if x.dim() != 2 + dims or x.shape[0] != 1), None)
        if odd is not None or len({(x.shape[2:], x.dtype, x.device) for x in keys}) > 1:
            raise ShapeError(
                f"{name} of several sequences are [1, S_n, ...] each, of one dtype and device; got "
                f"{[list(x.shape) for x in keys]}"
            )
    entry = entry_of(keys)
    if entry.dim() != 2 + dims:
        raise ShapeError(f"{name} must be {shape}, or so many dimensions in pages; got {list(entry.shape)}")
    if not entry.is_floating_point() or entry.device != q.device:
        raise ShapeError(
            f"{name} must be floating point on {q.device}, as q is; got {entry.dtype} on {entry.device}"
        )
    if isinstance(keys, Tensor):
        fits = keys.shape[1] >= q.shape[1] if seqs is None else keys.shape[1] == q.shape[1]
        if keys.shape[0] != q.shape[0] or not fits:
            wanted = "[B, S] with S >= T" if seqs is None else "the tokens of q"
            raise ShapeError(
                f"{name} must begin with {wanted}, [B, T] = {list(q.shape[:2])}; got {list(keys.shape)}"
            )
        return
    count = q.shape[0] if seqs is None else seqs.count
    if count_of(keys) != count:
        raise ShapeError(f"{name} is of {count_of(keys)} sequences and q of {count}")
    for n, held in enumerate(lengths_of(keys)):
        queries = q.shape[1] if seqs is None else seqs.lengths[n]
        if held < queries:
            raise ShapeError(
                f"sequence {n} has {queries} queries and {held} entries in {name}: the queries are the last of "
                "the tokens that the keys are of"
            )
