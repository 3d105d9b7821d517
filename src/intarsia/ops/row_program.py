"""Programs of what is done to each row of numbers alone: norms, products with packed weights, activations, sums.

Between two exchanges of a model's tokens every token is worked on alone, by operators that take microseconds each where
rows are few; calling them one by one takes longer. A `RowProgram` lists them once, and then each call computes all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops import native, packed_linear_cpu
from intarsia.ops.packed_weights import PackedWeights
from intarsia.ops.tracing import observed

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Place(NamedTuple):
    """Numbers of each row: `width` of them from `column` on, in a buffer of a program."""

    buffer: int
    column: int
    width: int

    def columns(self, first: int, count: int) -> Place:
        """Some of them.

        Raises:
            ShapeError: there are not so many.
        """
        if first < 0 or count < 1 or first + count > self.width:
            raise ShapeError(f"columns {first} .. {first + count - 1} of {self.width}")
        return Place(self.buffer, self.column + first, count)


class Product(NamedTuple):
    """A product of a `RowProgram`: rows, weights `[N, K]`, where it goes, and the bias `[N]`."""

    x: Place
    weights: PackedWeights
    to: Place
    bias: Tensor | None = None


class Choice(NamedTuple):
    """How a router's logits choose experts, as `intarsia.model.experts.Router` says it."""

    active: int
    groups: int
    active_groups: int
    softmax: bool
    """Scores are a softmax over all experts, or a sigmoid of each."""
    biased: bool
    """Weights are the scores with the bias."""
    normalize: bool
    factor: float
    bias: Tensor
    """`[E]` float32."""


class RowProgram:
    """Steps that are computed for each row alone, in the order in which they were listed, by the native kernels.

    Rows are of one dtype, float32 or bfloat16; each step computes in float32 and rounds its result to it. A row's
    numbers depend neither on the other rows nor on threads. Nothing is recorded by autograd.

    A program reads weights where they are: biases and norms' weights alone are copied.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._native = native.native().RowProgram(native.instruction_set())
        self._inputs: list[int] = []
        self._results: list[tuple[int, torch.dtype]] = []
        self._given: list[int] = []  # 0: an input, 1: a result

    @staticmethod
    def serves(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether there are kernels for rows of this dtype on this device."""
        return device.type == "cpu" and dtype in DTYPES and native.missing_reason() is None

    @staticmethod
    def can_run() -> bool:
        """Whether calls may go past PyTorch now: no autograd, and nobody who traces them."""
        return not torch.is_grad_enabled() and not observed()

    def input(self, width: int) -> Place:
        """Rows that each call gives, in the order of these; a step may write to them."""
        self._inputs.append(width)
        return self._buffer(width, 0, self._dtype)

    def result(self, width: int, dtype: torch.dtype | None = None) -> Place:
        """Rows that each call returns, in the order of these."""
        self._results.append((width, self._dtype if dtype is None else dtype))
        return self._buffer(width, 1, self._results[-1][1])

    def room(self, width: int, dtype: torch.dtype | None = None) -> Place:
        """Rows between steps."""
        return Place(self._native.buffer(width, False, DTYPES[dtype or self._dtype]), 0, width)

    def _buffer(self, width: int, kind: int, dtype: torch.dtype) -> Place:
        self._given.append(kind)
        return Place(self._native.buffer(width, True, DTYPES[dtype]), 0, width)

    def norm(self, x: Place, weight: Tensor, eps: float, to: Place | None = None) -> Place:
        """RMSNorm; `to` may be `x` itself, and by default is new room."""
        to = self.room(x.width) if to is None else to
        _alike("a norm", weight.shape[0], x.width, to.width)
        self._native.norm(*x[:2], *to[:2], weight.detach().float().contiguous(), eps)
        return to

    def products(self, products: Sequence[Product]) -> None:
        """Several products side by side: threads meet once."""
        for each in products:
            N, K = each.weights.shape[-2:]
            _alike("a product's rows", K, each.x.width)
            _alike("a product's result", N, each.to.width)
        self._native.products(
            [each.x[:2] for each in products],
            [packed_linear_cpu.handle_of(each.weights) for each in products],
            [each.to[:2] for each in products],
            [None if p.bias is None else p.bias.detach().float().contiguous() for p in products],
        )

    def product(self, x: Place, weights: PackedWeights, bias: Tensor | None = None) -> Place:
        """The product with one weight, in new room."""
        to = self.room(weights.shape[-2])
        self.products([Product(x, weights, to, bias)])
        return to

    def product_of_each(
        self,
        x: Place,
        weights: PackedWeights,
        to: Place,
        x_step: int | None = None,
        to_step: int | None = None,
    ) -> None:
        """The product of each of E pieces of a row, such as its heads, with a matrix of its own of `[E, N, K]`. The
        pieces begin `x_step` and `to_step` numbers after each other, by default K and N."""
        E, N, K = weights.shape
        x_step, to_step = K if x_step is None else x_step, N if to_step is None else to_step
        _inside(x, x_step, K, E)
        _inside(to, to_step, N, E)
        handle = packed_linear_cpu.handle_of(weights)
        self._native.product_of_each(*x[:2], x_step, *to[:2], to_step, handle)

    def swiglu(self, gate: Place, up: Place, to: Place | None = None) -> Place:
        """`silu(gate) up`, in new room by default."""
        to = self.room(gate.width) if to is None else to
        _alike("an activation", gate.width, up.width, to.width)
        self._native.swiglu(*gate[:2], *up[:2], *to)
        return to

    def experts(
        self, x: Place, logits: Place, choice: Choice, gate_up: PackedWeights, down: PackedWeights
    ) -> Place:
        """The weighted sum of SwiGLU experts `gate_up` `[E, 2 F, D]` and `down` `[E, D, F]` that each row's `logits`
        (float32 room) choose, in new room. Experts that no row chooses are not read."""
        to = self.room(x.width)
        *how, bias = choice
        handles = packed_linear_cpu.handle_of(gate_up), packed_linear_cpu.handle_of(down)
        bias = bias.detach().float().contiguous()
        self._native.experts(*x[:2], *logits[:2], *how, bias, *handles, *to[:2])
        return to

    def add(self, x: Place, to: Place, scale: float = 1.0) -> None:
        """`to = scale to + x`."""
        _alike("a sum", x.width, to.width)
        self._native.add(*x[:2], scale, *to)

    def copy(
        self, x: Place, to: Place, width: int, count: int = 1, x_step: int = 0, to_step: int = 0
    ) -> None:
        """`count` pieces of `width` numbers, which begin `x_step` and `to_step` numbers after each other."""
        _inside(x, x_step, width, count)
        _inside(to, to_step, width, count)
        self._native.copy(*x[:2], x_step, *to[:2], to_step, width, count)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results `[R, width]` of inputs `[R, width]`, on the CPU and in the program's dtype.

        Raises:
            ShapeError: inputs that are not those of the program.
        """
        first = inputs[0]
        results = [first.new_empty((first.shape[0], width), dtype=dtype) for width, dtype in self._results]
        left, made = iter(inputs), iter(results)
        try:
            if len(inputs) != len(self._inputs):
                raise ValueError(f"there are {len(inputs)} inputs")
            tensors = [next(made if kind else left) for kind in self._given]
            self._native.run(tensors, torch.get_num_threads())
        except ValueError as error:
            raise ShapeError(
                f"the program takes rows of {self._inputs} numbers in {self._dtype}; "
                f"got {[list(x.shape) for x in inputs]} {first.dtype}: {error}"
            ) from None
        return results


def _alike(what: str, *widths: int) -> None:
    if len(set(widths)) > 1:
        raise ShapeError(f"{what} must be as wide as the other rows; got {', '.join(map(str, widths))}")


def _inside(place: Place, step: int, width: int, count: int) -> None:
    last = (count - 1) * step + width
    if last > place.width:
        raise ShapeError(
            f"{count} pieces of {width} numbers, {step} after each other, would lie outside of their buffer: there are "
            f"{place.width}, not {last}"
        )
