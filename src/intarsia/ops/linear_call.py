"""A call of an operator of the linear family: the arguments that all of them share, checked and described."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.gate import Gate
from intarsia.ops.norm_torch import unit
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import sizes

Decay = Literal["none", "fixed", "head", "channel"]
Rule = Literal["additive", "delta", "general"]


@dataclass(frozen=True)
class LinearCall:
    """A checked call of a linear operator.

    `q`, `k` `[B, T, H, K]`; `v` `[B, T, HV, V]`; `g` by `decay`: None, `[HV]`, `[B, T, HV]` or
    `[B, T, HV, K]`; `beta` `[B, T, HV]` of the delta rule or None; `a` and `b` of the general rule or None, each
    `[B, T, HV, K]` or `[B, T, H, K]`; `initial_state` `[N, HV, K, V]` or None with `N` the number of sequences:
    `B`, or those that `seqs` packs into one row.

    Three things that layers do before the rule can be left to the operator, which spares passes over memory:
    `normalize` (q and k come as they are and are divided by their length), `gate` (`g` is raw) and `beta_max`
    (`beta` is raw: the write strength is `beta_max * sigmoid(beta)`). `plain()` does them in PyTorch.

    All may have dtypes of their own: everything is computed in `compute_dtype`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float
    initial_state: Tensor | None
    output_final_state: bool
    seqs: Sequences | None
    decay: Decay
    normalize: bool = False
    gate: Gate | None = None
    beta_max: float | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    in_slots: bool = False
    """Whether the state is given to the implementation in slots, and not as `initial_state`."""

    def plain(self, dtype: torch.dtype | None = None) -> LinearCall:
        """The same call with nothing left to the operator but the rule.

        What is done for it is computed in `dtype`, the compute dtype by default, and not rounded to another.
        """
        if not self.normalize and self.gate is None and self.beta_max is None:
            return self
        dtype = self.compute_dtype if dtype is None else dtype
        q, k, g, beta = self.q, self.k, self.g, self.beta
        if self.normalize:
            q, k = unit(q.to(dtype)), unit(k.to(dtype))
        if self.gate is not None and g is not None:
            g = self.gate.log_decay(g, dtype)
        if self.beta_max is not None and beta is not None:
            beta = self.beta_max * torch.sigmoid(beta.to(dtype))
        return replace(self, q=q, k=k, g=g, beta=beta, normalize=False, gate=None, beta_max=None)

    def after(self, state: Tensor) -> LinearCall:
        """The same call behind this state, with the one that follows."""
        return replace(self, initial_state=state, output_final_state=True, in_slots=False)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return (self.q.shape[1],) * self.q.shape[0] if self.seqs is None else self.seqs.lengths

    @property
    def shared_dtype(self) -> torch.dtype:
        """The dtype of q, k and v, or the compute dtype where they differ or the CPU kernels do not read them."""
        dtype = self.q.dtype
        return dtype if self.k.dtype == self.v.dtype == dtype != torch.float16 else self.compute_dtype

    def of_one_dtype(self) -> LinearCall:
        """The same call with q, k and v in their `shared_dtype`."""
        dtype = self.shared_dtype
        if self.q.dtype == self.k.dtype == self.v.dtype == dtype:
            return self
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    @property
    def rule(self) -> Rule:
        """What is erased: nothing, what lies along the key, or what `a` and `b` say."""
        if self.a is not None:
            return "general"
        return "additive" if self.beta is None else "delta"

    @property
    def sequences(self) -> int:
        """How many sequences there are, packed or not."""
        return self.seqs.count if self.seqs is not None else sizes(self.q)[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where q, k or v is, else float32: the dtype of the state and of everything inside."""
        return compute_dtype(self.q, self.k, self.v)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """`(N, HV, K, V)`."""
        _, _, HV, V = sizes(self.v)
        return self.sequences, HV, sizes(self.k)[3], V


def linear_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    beta_max: float | None = None,
) -> LinearCall:
    """Check the shapes, dtypes and devices of a call.

    Raises:
        ShapeError: naming the argument that does not fit and what would.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ShapeError(f"{name} must be [B, T, heads, dim]; got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    B, T, H, K = sizes(q)
    HV = sizes(v)[2]
    if k.shape != q.shape:
        raise ShapeError(f"k must have the shape of q, {list(q.shape)}; got {list(k.shape)}")
    if v.shape[:2] != (B, T):
        raise ShapeError(f"v must begin with [B, T] = [{B}, {T}]; got {list(v.shape)}")
    if min(B, T, H, K, *v.shape) == 0:
        raise ShapeError(f"q, k and v need at least one element; got q {list(q.shape)}, v {list(v.shape)}")
    if HV % H:
        raise ShapeError(f"the value heads must be a multiple of the query heads: {HV} is not one of {H}")
    decay = _decay_of(g, (B, T, HV, K))
    if beta is not None and beta.shape != (B, T, HV):
        raise ShapeError(f"beta must be [B, T, HV] = {[B, T, HV]}; got {list(beta.shape)}")
    for name, vectors in (("a", a), ("b", b)):
        if vectors is None:
            continue
        if vectors.shape != (B, T, HV, K) and vectors.shape != (B, T, H, K):
            raise ShapeError(
                f"{name} must be [B, T, HV, K] = {[B, T, HV, K]} or [B, T, H, K] = {[B, T, H, K]};"
                f" got {list(vectors.shape)}"
            )
        if not vectors.is_floating_point():
            raise ShapeError(f"{name} must be a floating-point tensor; got {vectors.dtype}")
    seqs = None if cu_seqlens is None else Sequences.from_cu_seqlens(cu_seqlens)
    if seqs is not None and (B != 1 or seqs.total != T):
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); q is {list(q.shape)}"
        )
    sequences = seqs.count if seqs is not None else B
    state_shape = (sequences, HV, K, v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ShapeError(
            f"initial_state must be [N, HV, K, V] = {list(state_shape)}; got {list(initial_state.shape)}"
            " (some libraries keep the state as [V, K]: transpose it)"
        )
    others = {"k": k, "v": v, "g": g, "beta": beta, "a": a, "b": b, "initial_state": initial_state}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ShapeError(f"{name} is on {other.device} and q on {q.device}")
    if gate is not None:
        check_gate(gate, decay, HV, K)
    if beta_max is not None and beta_max <= 0:
        raise ConfigError(f"beta_max must be positive; got {beta_max}")
    return LinearCall(
        q, k, v, g, beta, K**-0.5 if scale is None else scale, initial_state, output_final_state, seqs, decay,
        normalize, gate, beta_max, a, b,
    )  # fmt: skip


def delta_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    beta_max: float | None = None,
    **others: Any,
) -> LinearCall:
    """A checked call of the delta rule: one without `beta` writes with strength 1. The rest is as in `linear_call`."""
    if beta is None:
        beta, beta_max = v.new_ones(v.shape[:3]), None
    return linear_call(q, k, v, g, beta, beta_max=beta_max, **others)


def check_gate(gate: Gate, decay: Decay, HV: int, K: int) -> None:
    """Raise ShapeError or ConfigError unless the gate is one for HV heads of K channels."""
    if decay not in ("head", "channel"):
        raise ShapeError(f"a gate needs a raw g of [B, T, HV] or [B, T, HV, K]; the decay here is {decay!r}")
    if gate.A_log.shape != (HV,):
        raise ShapeError(f"A_log must be [HV] = {[HV]}; got {list(gate.A_log.shape)}")
    channels = HV * K if decay == "channel" else HV
    if gate.dt_bias is not None and gate.dt_bias.shape != (channels,):
        raise ShapeError(
            f"dt_bias must be {[channels]} for a decay of each {decay}; got {list(gate.dt_bias.shape)}"
        )
    if gate.lower_bound is not None and gate.lower_bound >= 0:
        raise ConfigError(f"the lower bound of a gate must be negative; got {gate.lower_bound}")


def _decay_of(g: Tensor | None, shape: tuple[int, int, int, int]) -> Decay:
    B, T, HV, K = shape
    if g is None:
        return "none"
    if not g.is_floating_point():
        raise ShapeError(f"g must be a floating-point tensor; got {g.dtype}")
    kinds: tuple[tuple[tuple[int, ...], Decay], ...] = (
        ((HV,), "fixed"), ((B, T, HV), "head"), ((B, T, HV, K), "channel"),
    )  # fmt: skip
    # Compared, and not looked up: a hash of a shape would bind a graph of torch.compile to its very numbers.
    for expected, kind in kinds:
        if g.shape == expected:
            return kind
    wanted = " or ".join(str(list(expected)) for expected, _ in kinds)
    raise ShapeError(f"g must be None or of shape {wanted}; got {list(g.shape)}")
