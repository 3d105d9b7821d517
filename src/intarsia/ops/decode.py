"""The decode step: a few tokens of many sequences through everything between a layer's projections.

A server keeps the states of its sequences in a `StatePool` for each layer, and says by `Slots` which of them a batch
continues; `DecodeStep` computes the batch's tokens and updates the pool in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import native
from intarsia.ops.arguments import Decay, check_gate
from intarsia.ops.conv import Activation
from intarsia.ops.cpu_common import DTYPES, apart_from_torch
from intarsia.ops.decode_torch import decode_in_torch
from intarsia.ops.gate import Gate
from intarsia.ops.norm import NormGate
from intarsia.ops.pools import Slots, StatePool


class DecodeStep:
    """What a layer of the linear family does to its projections' rows, on states in pools.

        q, k, v = silu(convolution(qkv))    q, k divided by their lengths    g = gate(g)    beta = sigmoid(beta)
        S = (I - beta k kᵀ) Diag(exp g) S + beta k vᵀ                        o = Sᵀ q · scale
        y = norm_weight o / rms(o) · norm_gate(z)

    Each part but the rule can be left out. Rows are flat, as projections give and take them: `[tokens, numbers of
    all heads]`, the tokens of a sequence behind each other. Computed in float32 (float64 for float64 rows).

    A sequence's numbers are the same to the bit whatever else is in the batch, whether its tokens come in one call
    or in several, and on any number of threads. The native kernels read every board once and write it once. Nothing
    here is recorded by autograd.
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
        scale: float | None = None,
        conv_weight: Tensor | None = None,
        activation: Activation | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 1e-5,
        norm_gate: NormGate | None = None,
        impl: str = "auto",
    ) -> None:
        """
        Args:
            heads, key_dim: of queries and keys, H and K.
            value_heads, value_dim: HV, a multiple of H, and V.
            decay: what `g` is: None, or `[HV]`, `[tokens, HV]` or `[tokens, HV * K]` ("fixed", "head", "channel").
            gate: `g` holds raw numbers, of which this gate makes the log-decay.
            erases: the delta rule (True) or the additive rule, which has no `beta`.
            beta_max: `beta` holds raw numbers; the write strength is `beta_max * sigmoid(beta)`.
            normalize: divide q and k by their lengths, as `l2norm` does.
            scale: of the queries; `K ** -0.5` by default.
            conv_weight: of the short convolution of q, k and v, `[channels, W]` with channels = 2 H K + HV V.
            activation: behind the convolution; `"silu"` or None.
            norm_weight: `[V]`, of the RMSNorm of each head's output.
            norm_eps: of that norm.
            norm_gate: what the norm is multiplied with: `"sigmoid"` of z, `"swish"`, or nothing.
            impl: `"cpu"` (native kernels), `"torch"` (plain PyTorch on any device, a sequence after the other), or
                `"auto"`: the kernels where they are installed and can read the tensors.

        The kernels keep copies of the weights, in the order in which they are read: a layer whose weights change
        needs a new step.

        Raises:
            ShapeError: weights that do not fit.
            ConfigError: options that do not fit together, or an unknown `impl`.
            UnsupportedError: `impl="cpu"` where there are no kernels.
        """
        self.heads, self.key_dim, self.value_heads, self.value_dim = heads, key_dim, value_heads, value_dim
        self.decay, self.gate, self.erases, self.beta_max = decay, gate, erases, beta_max
        self.normalize, self.scale = normalize, key_dim**-0.5 if scale is None else scale
        self.conv_weight = None if conv_weight is None else conv_weight.detach()
        self.activation = activation
        self.norm_weight = None if norm_weight is None else norm_weight.detach()
        self.norm_eps, self.norm_gate, self.impl = norm_eps, norm_gate, impl
        self.channels, self.values = 2 * heads * key_dim + value_heads * value_dim, value_heads * value_dim
        self._check()
        self._kernels = None if impl == "torch" else self._native_step()

    def new_pool(self, slots: int, dtype: torch.dtype = torch.float32, device: Any = None) -> StatePool:
        """A pool for states of this layer, of sequences that have not begun."""
        board, conv = self._state_shapes()
        rooms = [torch.zeros(slots, *x, dtype=dtype, device=device) for x in (board, conv) if x is not None]
        return StatePool(*rooms)

    def __call__(
        self,
        qkv: Tensor,
        pool: StatePool,
        slots: Slots,
        *,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        z: Tensor | None = None,
        into: StatePool | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The tokens' outputs `[tokens, HV * V]` in the dtype of qkv; the states are updated.

        Args:
            qkv: `[tokens, channels]`: q of all heads, then k, then v.
            pool: where the states are read, and written by default.
            slots: which of them, and how many tokens each sequence has.
            g: log-decays or what the gate makes them of, as `decay` says.
            beta: `[tokens, HV]` write strengths; None means 1.
            z: `[tokens, HV * V]`, what the norm's gate is made of.
            into: another pool to write the states to.
            out: where to write the outputs, which spares making a tensor for them.

        Raises:
            ShapeError, ConfigError: arguments that do not fit, before anything is written.
            UnsupportedError: tensors that `impl="cpu"` cannot serve.
        """
        if self._kernels is not None:
            o = out
            if o is None:
                o = torch.empty_like(z) if z is not None and z.dtype is qkv.dtype else self._room(qkv)
            other = (None, None) if into is None else (into.board, into.conv)
            done = self._kernels.run(
                qkv, g, beta, z, o, pool.board, pool.conv, *other, *slots.numbers, torch.get_num_threads()
            )
            if done:
                return o
        to = pool if into is None else into
        # Something does not fit and is named here; or it can be helped.
        self._check_rows(qkv, g, beta, z, out, slots.tokens)
        self._check_pools(pool, to, slots, wide=qkv.dtype == torch.float64)
        if self._kernels is not None:
            rows = [None if x is None else x.detach().contiguous() for x in (qkv, g, beta, z)]
            o = self._room(qkv)  # `out` may have gaps
            done = self._kernels.run(
                *rows, o, pool.board, pool.conv, to.board, to.conv, *slots.numbers, torch.get_num_threads()
            )
            if done:
                return o if out is None else out.copy_(o)
        if self.impl == "cpu":
            strange = next(x for x in (qkv, g, beta, z, pool.board) if x is not None and not _readable(x))
            raise UnsupportedError(
                f"impl='cpu' takes float32, float64 and bfloat16 on the CPU; got {strange.dtype} on {strange.device}"
            )
        with torch.no_grad():
            o = decode_in_torch(self, qkv, g, beta, z, pool, to, slots)
            return o if out is None else out.copy_(o)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kernels = None if self.impl == "torch" else self._native_step()

    def _room(self, qkv: Tensor) -> Tensor:
        return qkv.new_empty((qkv.shape[0], self.values))

    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Of the board and of the convolution's last inputs."""
        conv = None if self.conv_weight is None else (self.conv_weight.shape[1] - 1, self.channels)
        return (self.value_heads, self.key_dim, self.value_dim), conv

    def _check_rows(
        self,
        qkv: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        z: Tensor | None,
        out: Tensor | None,
        tokens: int,
    ) -> None:
        HV = self.value_heads
        decays = {"none": (), "fixed": (HV,), "head": (tokens, HV), "channel": (tokens, HV * self.key_dim)}
        if (g is None) != (self.decay == "none"):
            raise ShapeError(f"decay={self.decay!r} and g is {'missing' if g is None else 'given'}")
        if beta is not None and not self.erases:
            raise ShapeError("the additive rule takes no beta")
        if (z is None) != (self.norm_gate is None):
            raise ShapeError(f"norm_gate={self.norm_gate!r} and z is {'missing' if z is None else 'given'}")
        for name, x, shape in (
            ("qkv", qkv, (tokens, self.channels)),
            ("g", g, decays[self.decay]),
            ("beta", beta, (tokens, HV)),
            ("z", z, (tokens, self.values)),
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

    def _check_pools(self, pool: StatePool, to: StatePool, slots: Slots, wide: bool) -> None:
        board, conv = self._state_shapes()
        expected = (torch.float64 if wide else torch.float32, board, conv)
        for each in (pool, to):
            if each.form != expected:
                raise ShapeError(f"the pool must have {_describe(*expected)}; it has {_describe(*each.form)}")
        same = pool.board is to.board
        if apart_from_torch(pool.board.detach(), to.board.detach()):  # others have no memory to compare
            same = pool.board.data_ptr() == to.board.data_ptr()
        slots.check_pools(pool.slots, to.slots, same=same)

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
            ("impl", self.impl, ("auto", "cpu", "torch")),
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

    def _native_step(self) -> Any:
        """The kernels' own object, with copies of the weights; None where "auto" must do without."""
        missing = native.missing_reason()
        if missing is not None:
            if self.impl == "cpu":
                raise UnsupportedError(f"impl='cpu' cannot serve this step: {missing}")
            native.warn_if_missing()
            return None
        gate = self.gate
        weights = (
            None if gate is None else gate.A_log.double().exp(),
            None if gate is None or gate.dt_bias is None else gate.dt_bias.double(),
            None if self.conv_weight is None else self.conv_weight.double().mT,
            None if self.norm_weight is None else self.norm_weight.double(),
        )
        if not apart_from_torch(*(None if x is None else x.detach() for x in weights)) or any(
            x is not None and x.device.type != "cpu" for x in weights
        ):
            if self.impl == "cpu":
                raise UnsupportedError("impl='cpu' takes plain weights on the CPU, not traced ones")
            return None
        rate, bias, conv_weight, norm_weight = (
            None if x is None else x.detach().contiguous() for x in weights
        )
        bound = None if gate is None else gate.lower_bound
        return native.native().DecodeStep(
            H=self.heads,
            HV=self.value_heads,
            K=self.key_dim,
            V=self.value_dim,
            scale=self.scale,
            erases=self.erases,
            normalize=self.normalize,
            decay=("none", "head", "channel").index("head" if self.decay == "fixed" else self.decay),
            fixed=self.decay == "fixed",
            gate=0 if gate is None else 1 if bound is None else 2,
            bound=bound or 0.0,
            beta_scale=self.beta_max or 0.0,
            rate=rate,
            bias=bias,
            W=0 if self.conv_weight is None else self.conv_weight.shape[1],
            silu=self.activation == "silu",
            conv_weight=conv_weight,
            norm_weight=norm_weight,
            norm_eps=self.norm_eps,
            output_gate=(None, "sigmoid", "swish").index(self.norm_gate),
            isa=native.instruction_set(),
        )


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES


def _describe(dtype: torch.dtype, board: tuple[int, ...], conv: tuple[int, ...] | None) -> str:
    past = "no conv" if conv is None else f"conv [slots, {', '.join(map(str, conv))}]"
    return f"board [slots, {', '.join(map(str, board))}] and {past} of {dtype}"
