"""Modules as mixed precision trains them: the same modules, whose products read narrow copies of float32 weights.

Autocast casts every weight in every forward pass, and every gradient back. Here weights are cast once a step, into
memory that stays, however many micro-batches there are; and gradients are added up in float32 where they stay too:
fresh memory costs more than what is written there. The modules themselves know nothing of it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from intarsia.ops.precision import product_dtype, without_autocast

M = TypeVar("M", bound=nn.Module)


class NarrowWeight:
    """A weight's copy in a narrow dtype, and memory for the gradient of the weight, in the weight's own."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.copy = weight.detach().to(dtype, copy=True)
        self._room: Tensor | None = None

    def refresh(self) -> None:
        """Copy the weight as it is now."""
        self.copy.copy_(self.weight.detach())

    def gradient(self) -> tuple[Tensor, bool]:
        """`weight.grad`, to add to; and whether it has been None till now: then it holds no numbers yet, and all of it
        must be written."""
        if self.weight.grad is not None:
            return self.weight.grad, False
        if self._room is None:
            self._room = torch.empty_like(self.weight, requires_grad=False)
        self.weight.grad = self._room
        return self._room, True

    def add(self, part: Tensor) -> None:
        """Add to the gradient."""
        gradient, new = self.gradient()
        if new:
            gradient.copy_(part)
        else:
            gradient.add_(part)


class NarrowLinear(nn.Linear):
    """A linear map that reads the copy of its weight where autocast wants products in the copy's dtype.

    Its gradient is then added to `weight.grad` itself, without hooks of the parameter.
    """

    def __init__(self, linear: nn.Linear, narrow: NarrowWeight) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.narrow = linear.weight, linear.bias, narrow

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.narrow.copy.dtype
        if product_dtype(x) != dtype or x.dtype == torch.float64:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Product.apply(x.to(dtype), self.weight, self.bias, self.narrow)
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: NarrowWeight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.narrow = narrow
        return F.linear(x, narrow.copy, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,), narrow = ctx.saved_tensors, ctx.narrow
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        with without_autocast(x):
            rows = d_y.flatten(0, -2)
            if of_weight:
                narrow.add(rows.T @ x.flatten(0, -2))
            d_x = d_y @ narrow.copy if of_x else None
            d_bias = rows.sum(0, dtype=narrow.weight.dtype) if of_bias else None
        return d_x, None, d_bias, None


class NarrowEmbedding(nn.Embedding):
    """An embedding whose gradient stays where it is from step to step; what it gives is float32 as ever."""

    def __init__(self, embedding: nn.Embedding, narrow: NarrowWeight) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in embedding.__dict__.items() if not k.startswith("_")})
        self.weight, self.narrow = embedding.weight, narrow

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Rows.apply(input, self.weight, self.narrow)
        return y


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, weight: Tensor, narrow: NarrowWeight) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.narrow = narrow
        return F.embedding(numbers, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[None, None, None]:
        (numbers,) = ctx.saved_tensors
        gradient, new = ctx.narrow.gradient()
        if new:
            gradient.zero_()
        # In the order of the tokens, as PyTorch's own on a CPU.
        gradient.index_add_(0, numbers.flatten(), d_y.flatten(0, -2).to(gradient.dtype))
        return None, None, None


class Narrowed:
    """Makes modules whose linear maps read copies of their float32 weights in `dtype`. All else is shared with the
    originals, which stay as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._weights: dict[int, NarrowWeight] = {}
        self._made: dict[int, nn.Module] = {}

    def of(self, module: M) -> M:
        """The same module with narrow linear maps: PyTorch's own, and no subclasses of them."""
        if id(module) not in self._made:
            self._made[id(module)] = self._of(module)
        return cast(M, self._made[id(module)])

    def refresh(self) -> None:
        """Copy all weights as they are now: at the beginning of a step."""
        for each in self._weights.values():
            each.refresh()

    def _of(self, module: nn.Module) -> nn.Module:
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            return NarrowLinear(module, self._narrow(module.weight))
        if type(module) is nn.Embedding and _is_plain(module):
            return NarrowEmbedding(module, self._narrow(module.weight))
        made = copy.copy(module)
        made._modules = {
            name: None if child is None else self.of(child) for name, child in module._modules.items()
        }
        return made

    def _narrow(self, weight: Tensor) -> NarrowWeight:
        # A weight that two modules share has one copy and one gradient.
        if id(weight) not in self._weights:
            self._weights[id(weight)] = NarrowWeight(weight, self.dtype)
        return self._weights[id(weight)]


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether it only looks up, on a CPU: on GPUs sums in place have no fixed order."""
    return (
        embedding.weight.device.type == "cpu"
        and embedding.weight.requires_grad
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )
