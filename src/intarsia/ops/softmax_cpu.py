"""The native softmax over logits as `torch.library` custom operators; the kernels are in `csrc/softmax*`.

`softmax_gradient` is the gradient of a loss that is differentiated by hand, and has none of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.native_operator import detached, implementation, refuse, register, rows
from intarsia.ops.precision import compute_dtype
from intarsia.ops.softmax_call import LogSumCall, SoftmaxCall
from intarsia.ops.softmax_torch import log_sum_in_torch
from intarsia.ops.tracing import apart_from_torch, differentiable_once


def refuse_log_sum(call: LogSumCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    if call.logits.numel() == 0:
        return f"there is nothing to compute; logits is {list(call.logits.shape)}"
    return refuse("logits", call.logits)


def refuse_gradient(call: SoftmaxCall) -> str | None:
    """The same."""
    for tensor in call[1:]:
        if tensor.device != call.logits.device:
            return f"logits is on {call.logits.device} and another argument on {tensor.device}"
    return refuse_log_sum(LogSumCall(call.logits))


def cpu_log_sum(call: LogSumCall) -> Tensor:
    """Run the sum natively."""
    logits = rows(call.logits)
    if apart_from_torch(logits):
        return _sums(logits)
    y: Tensor = torch.ops.intarsia.log_sum_forward.default(logits)[0]
    return y


def cpu_gradient(call: SoftmaxCall) -> Tensor:
    """Run the gradient natively."""
    logits, log_sum, targets, gradient = call
    dtype = compute_dtype(logits)
    run = _gradient if apart_from_torch(*call) else torch.ops.intarsia.softmax_gradient.default
    y: Tensor = run(
        rows(logits), log_sum.to(dtype).contiguous(), targets.contiguous(), gradient.to(dtype).contiguous()
    )
    return y


def _sums(logits: Tensor) -> Tensor:
    y = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    native.native().log_sums(*detached([logits]), y, native.instruction_set(), torch.get_num_threads())
    return y


def _forward(logits: Tensor) -> tuple[Tensor, Tensor]:
    y = _sums(logits)
    return y, y.clone()


def _fake(logits: Tensor) -> tuple[Tensor, Tensor]:
    y = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    return y, torch.empty_like(y)


def _backward(logits: Tensor, log_sum: Tensor, d_y: Tensor) -> list[Tensor]:
    nowhere = torch.full(log_sum.shape, -1, dtype=torch.int64)
    return [_gradient(logits, log_sum, nowhere, d_y.contiguous())]


def _room(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _gradient(logits: Tensor, log_sum: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    y = _room(logits)
    native.native().softmax_gradients(
        *detached([logits, log_sum, targets, gradient]), y, native.instruction_set(), torch.get_num_threads()
    )
    return y


register(
    "log_sum",
    "log_sum_exp",
    tensors="Tensor logits",
    settings="",
    results="Tensor y",
    kept="Tensor log_sum",
    run=_forward,
    fake=_fake,
    run_backward=_backward,
    fake_backward=lambda logits, *_: [_room(logits)],
    again=lambda logits: (log_sum_in_torch(LogSumCall(logits)),),
)

_library = torch.library.Library("intarsia", "FRAGMENT")
_library.define("softmax_gradient(Tensor logits, Tensor log_sum, Tensor targets, Tensor gradient) -> Tensor")
torch.library.impl(_library, "softmax_gradient", "CPU")(_gradient)
torch.library.register_fake("intarsia::softmax_gradient", _room, lib=_library)
differentiable_once(_library, "intarsia::softmax_gradient", "log_sum_exp")

LOG_SUM = implementation(cpu_log_sum, refuse_log_sum)
GRADIENT = implementation(cpu_gradient, refuse_gradient)
