"""What the files that register native CPU kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.ops import native
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import constant_in_graphs
from intarsia.ops.tracing import differentiable_gradients, differentiable_once, observed, transform

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Optional = Tensor | None

_library = torch.library.Library("intarsia", "FRAGMENT")


# torch.compile need not trace how a module is looked for.
missing_reason = constant_in_graphs(native.missing_reason)


def refuse(name: str, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot serve a call whose main argument is `x`, or None where they can; `dtype` where they are
    not given that of `x`."""
    dtype = x.dtype if dtype is None else dtype
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if dtype not in DTYPES:
        return (
            f"the kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}; {name} is {dtype}"
        )
    return missing_reason() or transform()


def implementation(
    run: Callable[[Any], Any], refuse: Callable[[Any], str | None], fused: bool = False
) -> Implementation:
    """The row of the table for native kernels."""
    return Implementation("cpu", run, refuse, fused=fused, passed_over=_tell)


def _tell(refusal: str) -> None:
    """Let the user know where it is only that kernels are missing."""
    if not torch.compiler.is_compiling() and refusal == native.missing_reason():
        native.warn_if_missing()


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension without gaps; any other strides are the kernels' business."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def detached(tensors: Iterable[Optional]) -> list[Optional]:
    """Without autograd's marks, which DLPack refuses."""
    return [x.detach() if x is not None and x.requires_grad else x for x in tensors]


def edges_of(lengths: list[int]) -> list[int]:
    """The edges of packed sequences, or nothing where none are packed."""
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return edges if lengths else []


def register(
    name: str,
    of: str,
    *,
    tensors: str,
    settings: str,
    wanted: str = "",
    results: str,
    kept: str = "",
    like: int = 0,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    run_backward: Callable[..., list[Tensor]],
    fake_backward: Callable[..., list[Tensor]],
    again: Callable[..., Sequence[Optional]],
) -> Callable[..., Any]:
    """Tell PyTorch of native kernels, forward and backward, as `intarsia::<name>_forward` and `_backward`.

    PyTorch's dispatcher and what it makes of such an operator for autograd take some 50 microseconds a call, which is
    longer than many a call of a small model computes. So what is returned, and to be called in place of the operator,
    goes past them where nothing but autograd has to see the call.

    Args:
        of: what they compute, in words.
        tensors, settings, wanted, results, kept: arguments and results of the forward pass, as a schema writes them.
            What is `wanted` is no business of the backward pass, but the first of it says whether there is a second
            result; what is `kept` is a result for the backward pass alone.
        like: which of the tensors has the shape of the first result.
        run, fake: from `(*tensors, *settings, *wanted)` to `(*results, *kept)`: compute them; make room for them.
        run_backward, fake_backward: from `(*tensors, *settings, *kept, *gradients of the results)` to the gradients of
            the tensors, an empty one for a tensor that is None.
        again: from `(*tensors, *settings)` to the results, in PyTorch's own operations, for second derivatives.

    Returns:
        From `(*tensors, *settings, *wanted)` to `(*results, *kept)`, or to the result where there is one.
    """
    n, s = _count(tensors), _count(settings)
    gradients = ["Tensor d_0", *(f"Tensor? d_{i}" for i in range(1, _count(results)))]
    forward, backward = f"{name}_forward", f"{name}_backward"
    _library.define(f"{forward}({_listed(tensors, settings, wanted)}) -> ({_listed(results, kept)})")
    _library.define(f"{backward}({_listed(tensors, settings, kept, *gradients)}) -> Tensor[]")
    for operator, kernel, room in ((forward, run, fake), (backward, run_backward, fake_backward)):
        torch.library.impl(_library, operator, "CPU")(kernel)
        torch.library.register_fake(f"intarsia::{operator}", room, lib=_library)
    call_forward, call_backward = (
        getattr(torch.ops.intarsia, operator).default for operator in (forward, backward)
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings, ctx.second = inputs[n : n + s], len(inputs) == n + s or inputs[n + s]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*inputs[:n], *outputs[len(gradients) :])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *ds: Optional) -> tuple[Optional, ...]:
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives them once
        inputs, for_backward = saved[:n], saved[n:]
        d, *others = ds[: len(gradients)]
        others = [other if ctx.second else None for other in others]
        rest = [None] * (s + _count(wanted))
        if torch.is_grad_enabled():
            found = differentiable_gradients(lambda *x: again(*x, *ctx.settings), inputs, (d, *others))
            return (*found, *rest)
        d = torch.zeros_like(inputs[like]) if d is None else d
        # What is saved may be of another kind than what was given: activations can be packed in between.
        backward_run = run_backward if _is_plain((*saved, d, *others)) and not observed() else call_backward
        grads = backward_run(*inputs, *ctx.settings, *for_backward, d, *others)
        return (*(None if x is None else grad for grad, x in zip(grads, inputs, strict=True)), *rest)

    torch.library.register_autograd(
        f"intarsia::{forward}", differentiate, setup_context=setup_context, lib=_library
    )
    differentiable_once(_library, f"intarsia::{backward}", of)

    class Recorded(torch.autograd.Function):
        """The same for autograd alone."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            setup_context(ctx, arguments, output)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[len(gradients) :])
            return output

        backward = staticmethod(differentiate)

    def call(*arguments: Any) -> Any:
        given = arguments[:n]
        if observed() or not _is_plain(given):
            return call_forward(*arguments)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
            return Recorded.apply(*arguments)
        return run(*arguments)

    return call


def _is_plain(tensors: Iterable[Optional]) -> bool:
    """Whether all are PyTorch's own tensors on a CPU, and no subclasses of them."""
    return all(x is None or (type(x) in (Tensor, nn.Parameter) and x.is_cpu) for x in tensors)


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _count(arguments: str) -> int:
    return len(arguments.split(",")) if arguments else 0
