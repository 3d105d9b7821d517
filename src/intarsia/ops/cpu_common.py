"""What the files that register native CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops import native
from intarsia.ops.compiler import constant_in_graphs
from intarsia.ops.tracing import observed, transform

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Optional = Tensor | None


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


def prefers_kernels(impl: str, refusal: str | None, x: Tensor) -> bool:
    """Whether the kernels serve a call of an operator that has them and one form in PyTorch, "cpu" and "torch".

    Raises:
        ConfigError: no implementation has that name.
        UnsupportedError: the kernels are asked for by name and cannot serve.
    """
    if impl not in ("auto", "cpu", "torch"):
        raise ConfigError(f"there is no impl={impl!r}; there are auto, cpu, torch")
    if impl == "cpu" and refusal is not None:
        raise UnsupportedError(f"impl='cpu' cannot serve this call: {refusal}")
    if impl == "auto" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        native.warn_if_missing()
    return impl != "torch" and refusal is None


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension without gaps; any other strides are the kernels' business."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def detached(tensors: Iterable[Optional]) -> list[Optional]:
    """Without autograd's marks, which DLPack refuses."""
    return [x.detach() if x is not None and x.requires_grad else x for x in tensors]


def apart_from_torch(*tensors: Optional) -> bool:
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


def edges_of(lengths: list[int]) -> list[int]:
    """The edges of packed sequences, or nothing where none are packed."""
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return edges if lengths else []


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
