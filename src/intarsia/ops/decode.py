"""The decode step: a few tokens of many sequences through everything between a layer's projections.

A server keeps the states of its sequences in a `StatePool` for each layer, and says by `Slots` which of them a batch
continues; `DecodeStep` computes the batch's tokens and updates the pool in place.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import native
from intarsia.ops.arguments import Decay, check_gate
from intarsia.ops.conv import Activation
from intarsia.ops.decode_torch import decode_in_torch
from intarsia.ops.gate import Gate
from intarsia.ops.pools import Slots, StatePool

OutputGate = Literal["none", "sigmoid", "swish"]

# The numbers by which the kernels know these (`Dtype`, `Decay` and `OutputGate` in csrc).
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_DECAYS: dict[Decay, int] = {"none": 0, "fixed": 1, "head": 1, "channel": 2}
_OUTPUT_GATES: dict[OutputGate, int] = {"none": 0, "sigmoid": 1, "swish": 2}
_NOTHING = (0, -1)


class DecodeStep:
    """What a layer of the linear family does to its projections' rows, on states in pools.

        q, k, v = silu(convolution(qkv))    q, k divided by their lengths    g = gate(g)    beta = sigmoid(beta)
        S = (I - beta k kᵀ) Diag(exp g) S + beta k vᵀ                        o = Sᵀ q · scale
        y = norm_weight o / rms(o) · gate(z)

    Each part but the rule can be left out. Rows are flat, as projections give and take them: `[tokens, numbers of
    all heads]`, the tokens of a sequence behind each other. Computed in float32 (float64 where the pool is).

    The native kernels read every board once and write it once. A sequence's numbers are the same to the bit
    whatever else is in the batch, however many threads there are, and whether its tokens come in one call or
    in several. Nothing here is recorded by autograd.
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
        output_gate: OutputGate = "none",
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
            output_gate: what the norm is multiplied with: sigmoid(z), z sigmoid(z), or nothing.
            impl: `"cpu"` (native kernels), `"torch"` (plain PyTorch on any device), or `"auto"`: native kernels
                where there are any and the tensors are on the CPU in a dtype that they read.

        The weights are those of the layer, not copies: the step sees it when they are changed in place.

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
        self.norm_eps, self.output_gate, self.impl = norm_eps, output_gate, impl
        self.channels = 2 * heads * key_dim + value_heads * value_dim
        self._check()
        self._decays = {"none": 0, "fixed": 0, "head": value_heads, "channel": value_heads * key_dim}[decay]
        self._values = value_heads * value_dim
        self._absent = (decay == "none", False, output_gate == "none")
        board = (value_heads, key_dim, value_dim)
        conv = None if conv_weight is None else (self.channels, conv_weight.shape[1] - 1)
        # Of float32 states and of float64 states.
        self._forms = ((torch.float32, board, conv), (torch.float64, board, conv))
        self._kernels: tuple[Any, Any] = (None, None)
        if impl != "torch":
            missing = native.missing_reason()
            if missing is None:
                self._kernels = (self._native_step(False), self._native_step(True))
            elif impl == "cpu":
                raise UnsupportedError(f"impl='cpu' cannot serve this step: {missing}")
            native.warn_if_missing()

    def new_pool(self, slots: int, dtype: torch.dtype = torch.float32, device: Any = None) -> StatePool:
        """A pool for states of this layer, of sequences that have not begun."""
        _, board, conv = self._forms[dtype is torch.float64]
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
    ) -> Tensor:
        """The tokens' outputs `[tokens, HV * V]` in the dtype of qkv; the states are updated.

        Args:
            qkv: `[tokens, channels]`: q of all heads, then k, then v.
            pool: where the states are read, and written by default.
            slots: which of them, and how many tokens each sequence has.
            g: log-decays or what the gate makes them of, as `decay` says.
            beta: `[tokens, HV]` write strengths; None means 1.
            z: `[tokens, HV * V]`, what the output's gate is made of.
            into: another pool to write the states to.

        Raises:
            ShapeError, ConfigError: arguments that do not fit, before anything is written.
            UnsupportedError: tensors that `impl="cpu"` cannot serve.
        """
        tokens = slots.tokens
        qkv = self._rows("qkv", qkv, tokens, self.channels)
        if g is not None:
            g = self._rows("g", g, tokens, self._decays) if self.decay != "fixed" else self._fixed(g)
        if beta is not None:
            beta = self._rows("beta", beta, tokens, self.value_heads)
        if z is not None:
            z = self._rows("z", z, tokens, self._values)
        if (g is None, beta is not None and not self.erases, z is None) != self._absent:
            self._refuse_presence(g, beta, z)
        wide = qkv.dtype is torch.float64
        to = pool if into is None else into
        if pool.form != self._forms[wide] or to.form != pool.form:
            self._refuse_pool(pool if pool.form != self._forms[wide] else to, wide)
        board = pool.board.data_ptr()
        board_to = board if into is None else to.board.data_ptr()
        slots.check_pools(pool.slots, to.slots, board == board_to)

        kernels = self._kernels[wide]
        if kernels is None or not self._readable(qkv, g, beta, z, pool.board, to.board):
            if self.impl == "cpu":
                self._refuse_tensors(qkv, g, beta, z, pool.board, to.board)
            return decode_in_torch(self, qkv, g, beta, z, pool, to, slots)
        o = (
            torch.empty_like(z)
            if z is not None and z.dtype is qkv.dtype
            else qkv.new_empty((tokens, self._values))
        )
        kernels.run(
            qkv.data_ptr(),
            _DTYPES[qkv.dtype],
            *(_NOTHING if g is None else (g.data_ptr(), _DTYPES[g.dtype])),
            *(_NOTHING if beta is None else (beta.data_ptr(), _DTYPES[beta.dtype])),
            *(_NOTHING if z is None else (z.data_ptr(), _DTYPES[z.dtype])),
            o.data_ptr(),
            slots.count,
            *slots.addresses,
            board,
            0 if pool.conv is None else pool.conv.data_ptr(),
            board_to,
            0 if to.conv is None else to.conv.data_ptr(),
            torch.get_num_threads(),
        )
        return o

    def _rows(self, name: str, x: Tensor, tokens: int, width: int) -> Tensor:
        if x.shape != (tokens, width):
            raise ShapeError(f"{name} must be [tokens, numbers] = {[tokens, width]}; got {list(x.shape)}")
        return x if x.is_contiguous() else x.contiguous()

    def _fixed(self, g: Tensor) -> Tensor:
        if g.shape != (self.value_heads,):
            raise ShapeError(f"g must be [HV] = {[self.value_heads]} for a fixed decay; got {list(g.shape)}")
        return g.contiguous()

    @staticmethod
    def _readable(*tensors: Tensor | None) -> bool:
        return all(x is None or (x.is_cpu and x.dtype in _DTYPES) for x in tensors)

    def _refuse_presence(self, g: Tensor | None, beta: Tensor | None, z: Tensor | None) -> None:
        if (g is None) != (self.decay == "none"):
            raise ShapeError(f"decay={self.decay!r} and g is {'missing' if g is None else 'given'}")
        if beta is not None and not self.erases:
            raise ShapeError("the additive rule takes no beta")
        raise ShapeError(f"output_gate={self.output_gate!r} and z is {'missing' if z is None else 'given'}")

    def _refuse_pool(self, pool: StatePool, wide: bool) -> None:
        def say(form: Any) -> str:
            dtype, board, conv = form
            past = "no conv" if conv is None else f"conv [slots, {', '.join(map(str, conv))}]"
            return f"board [slots, {', '.join(map(str, board))}] and {past} of {dtype}"

        raise ShapeError(f"the pool must have {say(self._forms[wide])}; it has {say(pool.form)}")

    def _refuse_tensors(self, *tensors: Tensor | None) -> None:
        strange = next(x for x in tensors if not self._readable(x))
        assert strange is not None
        raise UnsupportedError(
            "impl='cpu' takes float32, float64 and bfloat16 on the CPU; "
            f"there is a {strange.dtype} tensor on {strange.device}"
        )

    def _check(self) -> None:
        H, HV = self.heads, self.value_heads
        if min(H, HV, self.key_dim, self.value_dim) < 1 or HV % H:
            raise ConfigError(
                "heads and dimensions must be positive and value_heads a multiple of heads; got "
                f"{H} and {HV} heads of {self.key_dim} and {self.value_dim}"
            )
        for name, value, known in (
            ("decay", self.decay, tuple(_DECAYS)),
            ("activation", self.activation, (None, "silu")),
            ("output_gate", self.output_gate, tuple(_OUTPUT_GATES)),
            ("impl", self.impl, ("auto", "cpu", "torch")),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
        if self.beta_max is not None and (self.beta_max <= 0 or not self.erases):
            raise ConfigError(f"beta_max={self.beta_max} must be positive and is for a rule that erases")
        if self.output_gate != "none" and self.norm_weight is None:
            raise ConfigError("an output gate belongs to the norm: it needs norm_weight")
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

    def _native_step(self, wide: bool) -> Any:
        """The kernels' own object, which keeps the addresses of the weights, or None where it cannot read them."""
        gate = self.gate
        A_log, dt_bias = (None, None) if gate is None else (gate.A_log.detach(), gate.dt_bias)
        weights = [
            None if x is None else x.detach().contiguous()
            for x in (A_log, dt_bias, self.conv_weight, self.norm_weight)
        ]
        if not self._readable(*weights):
            return None
        self._weights = weights  # kept alive
        kinds = {"none": 0, "softplus": 1, "bounded": 2}
        bound = None if gate is None else gate.lower_bound
        given = [_NOTHING if x is None else (x.data_ptr(), _DTYPES[x.dtype]) for x in weights]
        return native.native().DecodeStep(
            H=self.heads,
            HV=self.value_heads,
            K=self.key_dim,
            V=self.value_dim,
            scale=self.scale,
            erases=self.erases,
            normalize=self.normalize,
            decay=_DECAYS[self.decay],
            decays=self._decays,
            gate=kinds["none" if gate is None else "softplus" if bound is None else "bounded"],
            bound=bound or 0.0,
            beta_scale=self.beta_max or 0.0,
            A_log=given[0],
            dt_bias=given[1],
            W=0 if self.conv_weight is None else self.conv_weight.shape[1],
            silu=self.activation == "silu",
            conv_weight=given[2],
            norm_weight=given[3],
            norm_eps=self.norm_eps,
            output_gate=_OUTPUT_GATES[self.output_gate],
            wide=wide,
            isa=native.instruction_set(),
        )
