"""What the files that register native CPU kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import constant_in_graphs
from intarsia.ops.tracing import transform

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
