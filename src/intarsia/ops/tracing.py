"""What in PyTorch follows the calls that are made, and must see what they compute.

The native kernels work on memory: a program that is traced, a transform of `torch.func` or a dual number would go past
them unseen, and its result be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from intarsia.errors import UnsupportedError


def transform() -> str | None:
    """The transform of derivatives or batches that is at work, which knows PyTorch's own operations alone, or None."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work (grad, vmap, jvp, …), which looks into PyTorch's own operations"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed, which only PyTorch's own operations have"
    return None


def observed() -> bool:
    """Whether calls must go through PyTorch's dispatcher: something traces them, counts them, or puts tensors without
    memory in the place of others."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def apart_from_torch(*tensors: Tensor | None) -> bool:
    """Whether nothing of PyTorch has to see this call: no autograd, no tracing, no other kind of tensor.

    The kernels can then be called past the dispatcher, which takes longer than a token's worth of work.
    """
    if observed():
        return False
    records = torch.is_grad_enabled()
    return all(
        x is None or (type(x) in (Tensor, torch.nn.Parameter) and not (records and x.requires_grad))
        for x in tensors
    )


def fakes_beside(x: Tensor) -> AbstractContextManager[Any]:
    """Where tensors that are made are such that an operator can take them with x: fake ones for a fake tensor."""
    return x.fake_mode if isinstance(x, FakeTensor) else nullcontext()


def sizes(x: Tensor) -> tuple[int, ...]:
    """The shape of x as numbers: under `torch.jit.trace` its sizes are tensors, of which numbers are not made."""
    return tuple(int(n) for n in x.shape) if torch.jit.is_tracing() else x.shape


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `inputs` from those of the results of `function(*inputs)`, which can be differentiated again.

    What a hand-written backward pass answers with where its own result is to be differentiated: `function` computes
    the same by PyTorch's own operations.
    """
    with torch.enable_grad():
        # Other tensors for the same values: a gradient shall not run on into what made the inputs.
        leaves = [None if x is None else x.view_as(x) for x in inputs]
        results = function(*leaves)
        pairs = [
            (y, d)
            for y, d in zip(results, gradients, strict=True)
            if y is not None and d is not None and y.requires_grad
        ]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        if not (pairs and wanted):
            return [None] * len(inputs)
        outputs, ds = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, ds, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]


def differentiable_once(library: torch.library.Library, operator: str, of: str) -> None:
    """Let the gradients that `operator` computes for `of` not be differentiated again where it is called by itself.

    Without this PyTorch would take them for constants, and the second derivatives would be wrong. Who differentiates
    the operator whose gradients they are has them by `differentiable_gradients`.
    """

    def differentiate(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(
            f"{operator} gives first derivatives; for second ones differentiate {of} with create_graph=True"
        )

    torch.library.register_autograd(operator, differentiate, lib=library)
