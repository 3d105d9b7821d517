"""What a linear layer becomes for inference: a step that computes a few tokens at once between the projections."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.norm import GatedNorm
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState
from intarsia.ops import DecodeStep, Gate, Sequences
from intarsia.ops.linear_call import Decay


class Projected(NamedTuple):
    """What a delta-rule layer makes of its input `[..., D]` before tokens meet: all flat, `[..., numbers]`."""

    qkv: Tensor
    """Queries, keys and values of all heads, before the convolution."""
    g: Tensor | None
    """The raw decay."""
    beta: Tensor
    """The raw write strength."""
    z: Tensor | None
    """The raw output gate."""


class DeltaLayer(Protocol):
    """A mixer of the gated delta rule, as a `FusedStep` sees it."""

    @property
    def memory(self) -> RecurrentMemory: ...

    conv: ShortConvolution | None
    norm: GatedNorm
    o_proj: nn.Linear

    def project(self, x: Tensor) -> Projected: ...

    def check_input(self, x: Tensor, state: Any, seqs: Sequences | None) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class FusedStep:
    """A delta-rule layer that was made ready for inference, called as the layer is.

    A few tokens that follow a state take one native step between the projections, which reads each state once and
    writes it once, in place where it is in a pool. All else goes through the layer. The step has copies of the weights
    of convolution, decay and norm as they are when it is made: where they change, make another.
    """

    def __init__(self, layer: DeltaLayer, step: DecodeStep) -> None:
        self.layer, self.step = layer, step

    def __call__(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        lengths = (x.shape[1],) * x.shape[0] if seqs is None else seqs.lengths
        if state is None or not _serves(max(lengths), x, state):
            done: tuple[Tensor, RecurrentState | None] = self.layer(x, state, seqs)
            return done
        self.layer.check_input(x, state, seqs)
        rows = self.layer.project(x.flatten(0, 1))
        o, state = state.through(
            lengths,
            lambda pool, slots, into: self.step(
                rows.qkv, pool, slots, g=rows.g, beta=rows.beta, z=rows.z, into=into
            ),
        )
        y: Tensor = self.layer.o_proj(o)
        return y.view(x.shape), state


def fused_step(
    layer: DeltaLayer, *, heads: int, decay: Decay, gate: Gate | None, beta_max: float, normalize: bool = True
) -> FusedStep | None:
    """The step of a layer with `heads` query and key heads, or None where its weights cannot be read here, since they
    are divided among processes. `gate` makes the decay, with the parameters themselves."""
    conv, norm = None if layer.conv is None else layer.conv.weight, layer.norm
    weights = [norm.weight, conv, *((gate.A_log, gate.dt_bias) if gate is not None else ())]
    if any(weight is not None and type(weight) not in (Tensor, nn.Parameter) for weight in weights):
        return None
    value_heads, key_dim, value_dim = layer.memory.board
    step = DecodeStep(
        heads=heads,
        key_dim=key_dim,
        value_heads=value_heads,
        value_dim=value_dim,
        decay=decay,
        gate=gate,
        beta_max=beta_max,
        normalize=normalize,
        conv_weight=conv,
        activation="silu",
        norm_weight=norm.weight,
        norm_eps=norm.eps,
        norm_gate=None if norm.gate == "none" else norm.gate,
    )
    return FusedStep(layer, step)


def _serves(tokens: int, x: Tensor, state: RecurrentState) -> bool:
    """Whether the step takes so many tokens of each sequence: outside of autograd, where it is the faster way."""
    return not torch.is_grad_enabled() and DecodeStep.is_faster(tokens, x, *state.held_by)
