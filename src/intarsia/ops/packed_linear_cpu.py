"""The native products with packed weights, for few rows; the kernels are in `csrc/few_rows*`. More rows are multiplied
by PyTorch's products with weights in bfloat16 where those are faster."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.native_operator import Optional, implementation, refuse, rows
from intarsia.ops.packed_linear_call import PackedLinearCall
from intarsia.ops.packed_linear_torch import packed_linear_torch
from intarsia.ops.packed_weights import FLOATING, PackedWeights, WeightFormat
from intarsia.ops.tracing import apart_from_torch
from intarsia.ops.widened import is_widened

FEW = 32
"""For up to so many rows of one matrix the kernels are faster than PyTorch's products (`benchmarks/products.py`)."""

_PIECE = 1 << 22
"""Bytes of weights that are made bfloat16 at a time: they stay in the cache until they are multiplied."""


def _refuse(call: PackedLinearCall) -> str | None:
    if call.weights.device.type != "cpu":
        return f"the weights are on {call.weights.device}"
    if torch.float64 in (call.x.dtype, call.dtype):
        return "the kernels take float32 and bfloat16, and give them"
    return refuse("x", call.x)


def packed_linear_cpu(call: PackedLinearCall) -> Tensor:
    """By the kernels, which read each weight once for all rows; by PyTorch's products where one matrix has so many rows
    that those are faster. For them integers times scales may be rounded to bfloat16."""
    x, weights, bias, matrix_of_row, dtype = call
    by_torch = weights.format in FLOATING or is_widened(x)
    if by_torch and matrix_of_row is None and x.shape[0] > _few(x, weights.format):
        return packed_linear_torch(call)
    bias = None if bias is None else bias.float().contiguous()
    if apart_from_torch(x, weights.data, bias, matrix_of_row):
        return _run(
            handle_of(weights), rows(x), bias, matrix_of_row, weights.format, weights.shape[-2], dtype
        )
    y = torch.ops.intarsia.packed_linear(
        rows(x), weights.data, weights.scales, weights.zeros, bias, matrix_of_row, weights.format,
        list(weights.shape), weights.group, dtype,
    )  # fmt: skip
    return y


def _run(
    handle: Any,
    x: Tensor,
    bias: Optional,
    matrix_of_row: Optional,
    format: WeightFormat,
    N: int,
    dtype: torch.dtype,
) -> Tensor:
    if matrix_of_row is None and format not in FLOATING and x.shape[0] > _few(x, format):
        y = _by_whole_products(handle, x, N)
        return (y if bias is None else y.float() + bias).to(dtype)
    y = x.new_empty((x.shape[0], N), dtype=dtype)
    if matrix_of_row is not None:
        matrix_of_row = matrix_of_row.contiguous()
    handle.product(x.detach(), y, matrix_of_row, bias, torch.get_num_threads())
    return y


def _few(x: Tensor, format: WeightFormat) -> float:
    """For up to how many rows of one matrix the kernels are faster."""
    if is_widened(x):
        # Kernels make weights float32 once for many rows, as PyTorch's products would want them, without a copy.
        return math.inf if native.instruction_set() != "portable" else FEW
    if format in FLOATING:
        return FEW
    # Rows of float32 want more digits than bfloat16 has. With AVX-512 alone the kernels were never slower, whatever
    # PyTorch makes of bfloat16 there.
    return FEW if x.dtype == torch.bfloat16 and _multiplies_bfloat16() else math.inf


@functools.cache
def _multiplies_bfloat16() -> bool:
    return not {"avx512_bf16", "amx"}.isdisjoint(native.native().available())


def _by_whole_products(handle: Any, x: Tensor, N: int) -> Tensor:
    each = max(1, _PIECE // (2 * x.shape[1]))
    room, y = x.new_empty(min(each, N), x.shape[1]), []
    for first in range(0, N, each):
        weights = room[: N - first]
        handle.unpack(weights, first, torch.get_num_threads())
        y.append(F.linear(x, weights))
    return y[0] if len(y) == 1 else torch.cat(y, dim=1)


def handle_of(weights: PackedWeights) -> Any:
    """The kernels' own object for these weights, kept beside them: it holds their addresses."""
    kept = weights.__dict__.get("_handle")
    if kept is None:
        kept = _new_handle(
            weights.data, weights.scales, weights.zeros, weights.format, weights.shape, weights.group
        )
        weights.__dict__["_handle"] = kept
    return kept


def _new_handle(
    data: Tensor, scales: Optional, zeros: Optional, format: str, shape: tuple[int, ...], group: int
) -> Any:
    contiguous = (None if x is None else x.detach().contiguous() for x in (data, scales, zeros))
    data, scales, zeros = contiguous  # type: ignore[assignment]
    matrices, N, K = (1, *shape) if len(shape) == 2 else shape
    return native.native().FewRows(
        format,
        data.view(torch.uint8).view(-1),
        matrices,
        N,
        K,
        group,
        scales,
        zeros,
        native.instruction_set(),
    )


_library = torch.library.Library("intarsia", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor data, Tensor? scales, Tensor? zeros, Tensor? bias, Tensor? matrix_of_row,"
    " str format, int[] shape, int group, ScalarType dtype) -> Tensor"
)


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(
    x: Tensor, data: Tensor, scales: Optional, zeros: Optional, bias: Optional, matrix_of_row: Optional,
    format: WeightFormat, shape: list[int], group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    handle = _new_handle(data, scales, zeros, format, tuple(shape), group)
    return _run(handle, x, bias, matrix_of_row, format, shape[-2], dtype)


@torch.library.register_fake("intarsia::packed_linear", lib=_library)
def _packed_linear_fake(
    x: Tensor, data: Tensor, scales: Optional, zeros: Optional, bias: Optional, matrix_of_row: Optional,
    format: str, shape: list[int], group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], shape[-2]), dtype=dtype)


IMPLEMENTATION = implementation(packed_linear_cpu, _refuse)
