"""The decode step: a few tokens of many sequences through everything between a layer's projections.

A server keeps the states of its sequences in a `StatePool` for each layer, and says by `Slots` which of them a batch
continues; `DecodeStep` computes the batch's tokens and updates the pool in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.ops.choice import Choice, Implementation
from intarsia.ops.conv_call import Activation
from intarsia.ops.decode_call import FEW, Step, StepCall, StepForm, StepRows
from intarsia.ops.gate import Gate
from intarsia.ops.linear_call import Decay
from intarsia.ops.norm_call import NormGate
from intarsia.ops.pools import Slots, StatePool
from intarsia.ops.table import TABLE
from intarsia.ops.tracing import apart_from_torch


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
            impl: `"cpu"` (native kernels), `"torch"` (plain PyTorch on any device, a sequence after the other),
                `"reference"` (that in float64), or `"auto"`: the kernels where they are installed and can read the
                tensors.

        The kernels keep copies of the weights, in the order in which they are read: a layer whose weights change
        needs a new step.

        Raises:
            ShapeError: weights that do not fit.
            ConfigError: options that do not fit together, or an unknown `impl`.
            UnsupportedError: `impl="cpu"` where there are no kernels.
        """
        self.form, self.impl = (
            StepForm(
                heads=heads, key_dim=key_dim, value_heads=value_heads, value_dim=value_dim, decay=decay, gate=gate,
                erases=erases, beta_max=beta_max, normalize=normalize, scale=scale, conv_weight=conv_weight,
                activation=activation, norm_weight=norm_weight, norm_eps=norm_eps, norm_gate=norm_gate,
            ),
            impl,
        )  # fmt: skip
        self._make()

    @property
    def channels(self) -> int:
        """The numbers in a row of q, k and v: `2 H K + HV V`."""
        return self.form.channels

    @staticmethod
    def is_faster(tokens: int, *tensors: Tensor | None) -> bool:
        """Whether a step takes the next `tokens` of sequences through faster than the operators one by one, which
        autograd and everything else in PyTorch can look into: a few tokens outside of them, where a step was written
        for the device that the `tensors` are on."""
        return (
            tokens <= FEW
            and apart_from_torch(*tensors)
            and TABLE["decode_step"].choose(StepCall(tensors=tensors)).fused
        )

    def new_pool(self, slots: int, dtype: torch.dtype = torch.float32, device: Any = None) -> StatePool:
        """A pool for states of this layer, of sequences that have not begun."""
        shapes = (self.form.board, self.form.past)
        rooms = [torch.zeros(slots, *x, dtype=dtype, device=device) for x in shapes if x is not None]
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
        done = self._step.attempt(qkv, g, beta, z, out, pool, into, slots)
        if done is not None:
            return done
        # Something does not fit and is named here; or it can be helped.
        call = self._call(qkv, pool, slots, g=g, beta=beta, z=z, into=into, out=out)
        chosen = TABLE["decode_step"].choose(call, self.impl)
        step = self._step if chosen.name == self._name else chosen.run(call)
        assert call.rows is not None
        return step.run(call.rows)

    def explain(self, *args: Any, **kwargs: Any) -> Choice:
        """Which implementation a call with these arguments would run, and why; errors as of the call."""
        return TABLE["decode_step"].explain(self._call(*args, **kwargs), self.impl)

    def _call(
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
    ) -> StepCall:
        rows = StepRows(qkv, g, beta, z, out, pool, pool if into is None else into, slots)
        self.form.check_rows(rows)
        return StepCall(self.form, rows, (qkv, g, beta, z, pool.board, pool.conv))

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "impl": self.impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make()

    def _make(self) -> None:
        call = StepCall(self.form)
        chosen = TABLE["decode_step"].choose(call, self.impl)
        self._name, self._step = chosen.name, _made(chosen, call)


def _made(chosen: Implementation, call: StepCall) -> Step:
    step: Step = chosen.run(call)
    return step


def step_call(**options: Any) -> StepCall:
    """What `explain` looks at for a step that is yet to be made."""
    return StepCall(StepForm(**options))
