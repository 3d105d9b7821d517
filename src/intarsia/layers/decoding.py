"""What a linear layer becomes for inference: a step that computes a few tokens at once between the projections."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.norm import GatedNorm
from intarsia.layers.packed import weights_of
from intarsia.layers.parted import Parted, Rows
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState
from intarsia.ops import DecodeStep, Gate, Sequences
from intarsia.ops.linear_call import Decay
from intarsia.ops.row_program import Place, Product, RowProgram


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


class Projections(NamedTuple):
    """The maps that make what is `Projected`: linear ones, or of low rank two of them behind each other."""

    qkv: tuple[nn.Module, ...]
    g: nn.Module | None
    beta: nn.Module
    z: nn.Module | None

    @property
    def maps(self) -> tuple[nn.Module, ...]:
        """Each by itself, in the order of the results."""
        return (*self.qkv, *(each for each in (self.g, self.beta, self.z) if each is not None))


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


class FusedStep(Parted):
    """A delta-rule layer that was made ready for inference, called as the layer is, or in three parts.

    A few tokens that follow a state take one native step between the projections, which reads each state once and
    writes it once, in place where it is in a pool. All else goes through the layer. The step has copies of the weights
    of convolution, decay and norm as they are when it is made: where they change, make another.
    """

    def __init__(self, layer: DeltaLayer, step: DecodeStep, projections: Projections | None) -> None:
        self.layer, self.step, self._projections = layer, step, projections

    def __call__(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        lengths = (x.shape[1],) * x.shape[0] if seqs is None else seqs.lengths
        if state is None or not _serves(max(lengths), x, state):
            done: tuple[Tensor, RecurrentState | None] = self.layer(x, state, seqs)
            return done
        self.layer.check_input(x, state, seqs)
        rows = self.layer.project(x.flatten(0, 1))
        o, state = self._stepped(state, lengths, rows.qkv, rows.g, rows.beta, rows.z)
        y: Tensor = self.layer.o_proj(o)
        return y.view(x.shape), state

    @property
    def parts(self) -> bool:
        if self._projections is None:
            return False
        linear = [each for module in self._projections.maps for each in _linear(module)]
        return all(weights_of(each) is not None for each in (*linear, self.layer.o_proj))

    def begin(self, program: RowProgram, x: Place) -> None:
        assert self._projections is not None
        maps = self._projections.maps
        widths = [_linear(module)[-1].out_features for module in maps]
        joined = len(self._projections.qkv)
        qkv = program.result(sum(widths[:joined]))
        edges = [sum(widths[:n]) for n in range(joined)]
        to = [qkv.columns(edge, width) for edge, width in zip(edges, widths, strict=False)]
        to += [program.result(width) for width in widths[joined:]]
        # All that read x in one go, and then all that read what those gave.
        stages: list[list[Product]] = [[], []]
        for module, place in zip(maps, to, strict=True):
            here = x
            linear = _linear(module)
            for n, each in enumerate(linear):
                weights = weights_of(each)
                assert weights is not None
                there = place if n + 1 == len(linear) else program.room(each.out_features)
                stages[n].append(Product(here, weights, there, each.bias))
                here = there
        for stage in filter(None, stages):
            program.products(stage)

    def exchange(
        self, rows: Rows, shape: tuple[int, int], state: RecurrentState, seqs: Sequences | None
    ) -> tuple[Tensor, RecurrentState]:
        assert self._projections is not None
        made = iter(rows)
        qkv = next(made)
        g = None if self._projections.g is None else next(made)
        beta = next(made)
        z = None if self._projections.z is None else next(made)
        lengths = (shape[1],) * shape[0] if seqs is None else seqs.lengths
        return self._stepped(state, lengths, qkv, g, beta, z)

    def _stepped(
        self,
        state: RecurrentState,
        lengths: tuple[int, ...],
        qkv: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        z: Tensor | None,
    ) -> tuple[Tensor, RecurrentState]:
        return state.through(
            lengths, lambda pool, slots, into: self.step(qkv, pool, slots, g=g, beta=beta, z=z, into=into)
        )

    def finish(self, program: RowProgram) -> Place:
        weights = weights_of(self.layer.o_proj)
        assert weights is not None
        return program.product(program.input(weights.shape[-1]), weights, self.layer.o_proj.bias)


def fused_step(
    layer: DeltaLayer,
    *,
    heads: int,
    decay: Decay,
    gate: Gate | None,
    beta_max: float,
    normalize: bool = True,
    projections: Projections | None = None,
) -> FusedStep | None:
    """The step of a layer with `heads` query and key heads, or None where its weights cannot be read here, since they
    are divided among processes. `gate` makes the decay, with the parameters themselves. `projections` are what
    `layer.project` does, where it does no more."""
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
    return FusedStep(layer, step, projections)


def _linear(module: nn.Module) -> list[nn.Linear]:
    """The linear maps that a projection is made of, in their order."""
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


def _serves(tokens: int, x: Tensor, state: RecurrentState) -> bool:
    """Whether the step takes so many tokens of each sequence: outside of autograd, where it is the faster way."""
    return not torch.is_grad_enabled() and DecodeStep.is_faster(tokens, x, *state.held_by)
