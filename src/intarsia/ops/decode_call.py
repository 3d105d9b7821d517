"""What a decode step is made of, and what it is called with, checked."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.conv_call import Activation
from intarsia.ops.gate import Gate
from intarsia.ops.linear_call import Decay, check_gate
from intarsia.ops.norm_call import NormGate
from intarsia.ops.pools import Slots, StatePool
from intarsia.ops.tracing import apart_from_torch

FEW = 32
"""Up to so many tokens of a sequence a step is faster than a chunk."""


class StepForm:
    """What a step does, with its weights. The attributes are the arguments of `DecodeStep`; `general`, which native
    steps alone can be: the rule of `dplr_rule`, whose `a` and `b` come with the rows; and:

    Attributes:
        channels: of the convolution and of a row of q, k and v: `2 H K + HV V`.
        values: in a row of outputs: `HV V`.
        board: the shape of a state's board, `(HV, K, V)`.
        past: that of the convolution's last inputs, `(W - 1, channels)`, or None without a convolution.
    """

    def __init__(
        self,
        *,
        heads: int,
        key_dim: int,
        value_heads: int,
        value_dim: int,
        decay: Decay = "none",
        gate: Gate | None = None,
        erases: bool = True,
        beta_max: float | None = None,
        normalize: bool = False,
        general: bool = False,
        scale: float | None = None,
        conv_weight: Tensor | None = None,
        activation: Activation | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 1e-5,
        norm_gate: NormGate | None = None,
    ) -> None:
        self.heads, self.key_dim, self.value_heads, self.value_dim = heads, key_dim, value_heads, value_dim
        self.decay, self.gate, self.erases, self.beta_max = decay, gate, erases, beta_max
        self.general = general
        self.normalize, self.scale = normalize, key_dim**-0.5 if scale is None else scale
        self.conv_weight = None if conv_weight is None else conv_weight.detach()
        self.activation = activation
        self.norm_weight = None if norm_weight is None else norm_weight.detach()
        self.norm_eps, self.norm_gate = norm_eps, norm_gate
        self.channels, self.values = 2 * heads * key_dim + value_heads * value_dim, value_heads * value_dim
        self._check()
        self.board = (value_heads, key_dim, value_dim)
        self.past = None if conv_weight is None else (conv_weight.shape[1] - 1, self.channels)

    def check_rows(self, rows: StepRows) -> None:
        """Raise ShapeError unless these are rows and pools of a step of this form, ConfigError unless they are slots
        of such pools."""
        HV, tokens = self.value_heads, rows.slots.tokens
        decays = {"none": (), "fixed": (HV,), "head": (tokens, HV), "channel": (tokens, HV * self.key_dim)}
        if (rows.g is None) != (self.decay == "none"):
            raise ShapeError(f"decay={self.decay!r} and g is {'missing' if rows.g is None else 'given'}")
        if rows.beta is not None and not self.erases:
            raise ShapeError("the additive rule takes no beta")
        if (rows.z is None) != (self.norm_gate is None):
            raise ShapeError(
                f"norm_gate={self.norm_gate!r} and z is {'missing' if rows.z is None else 'given'}"
            )
        qkv, out = rows.qkv, rows.out
        for name, x, shape in (
            ("qkv", qkv, (tokens, self.channels)),
            ("g", rows.g, decays[self.decay]),
            ("beta", rows.beta, (tokens, HV)),
            ("z", rows.z, (tokens, self.values)),
            ("out", out, (tokens, self.values)),
        ):
            if x is not None and x.shape != shape:
                raise ShapeError(f"{name} must be {list(shape)}; got {list(x.shape)}")
            if x is not None and (not x.is_floating_point() or x.device != qkv.device):
                raise ShapeError(
                    f"{name} must be of floating-point numbers on {qkv.device}; got {x.dtype} on {x.device}"
                )
        if out is not None and out.dtype != qkv.dtype:
            raise ShapeError(f"out must be {qkv.dtype}, as qkv is; got {out.dtype}")
        self._check_pools(rows)

    def _check_pools(self, rows: StepRows) -> None:
        wide = torch.float64 if rows.qkv.dtype == torch.float64 else torch.float32
        expected = (wide, self.board, self.past)
        for each in (rows.pool, rows.into):
            if each.form != expected:
                raise ShapeError(f"the pool must have {_describe(*expected)}; it has {_describe(*each.form)}")
        board, to = rows.pool.board, rows.into.board
        same = board is to
        if apart_from_torch(board.detach(), to.detach()):  # others have no memory to compare
            same = board.data_ptr() == to.data_ptr()
        rows.slots.check_pools(rows.pool.slots, rows.into.slots, same=same)

    def _check(self) -> None:
        H, HV = self.heads, self.value_heads
        if min(H, HV, self.key_dim, self.value_dim) < 1 or HV % H:
            raise ConfigError(
                "heads and dimensions must be positive and value_heads a multiple of heads; got "
                f"{H} and {HV} heads of {self.key_dim} and {self.value_dim}"
            )
        for name, value, known in (
            ("decay", self.decay, ("none", "fixed", "head", "channel")),
            ("activation", self.activation, (None, "silu")),
            ("norm_gate", self.norm_gate, (None, "sigmoid", "swish")),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
        if self.beta_max is not None and (self.beta_max <= 0 or not self.erases):
            raise ConfigError(f"beta_max={self.beta_max} must be positive and is for a rule that erases")
        if self.norm_gate is not None and self.norm_weight is None:
            raise ConfigError("norm_gate belongs to the norm: it needs norm_weight")
        if self.gate is not None:
            check_gate(self.gate, self.decay, HV, self.key_dim)
        weight = self.conv_weight
        if weight is not None and (
            weight.dim() != 2 or weight.shape[0] != self.channels or weight.shape[1] < 1
        ):
            raise ShapeError(
                f"conv_weight must be [channels, W] = [{self.channels}, W]; got {list(weight.shape)}"
            )
        if self.norm_weight is not None and self.norm_weight.shape != (self.value_dim,):
            raise ShapeError(f"norm_weight must be {[self.value_dim]}; got {list(self.norm_weight.shape)}")


class StepRows(NamedTuple):
    """What a step is called with; the names are those of the arguments of `DecodeStep.__call__`."""

    qkv: Tensor
    g: Tensor | None
    beta: Tensor | None
    z: Tensor | None
    out: Tensor | None
    pool: StatePool
    into: StatePool
    slots: Slots
    a: Tensor | None = None
    b: Tensor | None = None


class StepCall(NamedTuple):
    """A decode step and what it is called with, checked; as far as it is known. An implementation runs it by making
    a `Step` of its form."""

    form: StepForm | None = None
    rows: StepRows | None = None
    tensors: tuple[Tensor | None, ...] = ()
    """What is read of the rows and the pool."""


class Step(Protocol):
    """What an implementation of the decode step makes of a `StepForm`: with its weights in the order that it likes."""

    def attempt(
        self,
        qkv: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        z: Tensor | None,
        out: Tensor | None,
        pool: StatePool,
        into: StatePool | None,
        slots: Slots,
    ) -> Tensor | None:
        """The outputs, at once, of arguments that nobody has checked; or None where something is in the way, and then
        nothing has been written."""
        ...

    def run(self, rows: StepRows) -> Tensor:
        """The outputs of checked arguments."""
        ...


def _describe(dtype: torch.dtype, board: tuple[int, ...], conv: tuple[int, ...] | None) -> str:
    past = "no conv" if conv is None else f"conv [slots, {', '.join(map(str, conv))}]"
    return f"board [slots, {', '.join(map(str, board))}] and {past} of {dtype}"
