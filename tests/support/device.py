"""The device that the numeric tests run on: `--device cuda`.

Tests draw their tensors on the CPU, from generators of their own, so that the numbers are the same everywhere. On
another device a mode puts what a test makes there; what the library makes is left alone, since putting it in the right
place is its own business and part of what is tested. Modules are moved by what builds them for the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

TESTS = str(Path(__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
FILES = (
    "ops/test_linear.py",
    "ops/test_dplr.py",
    "ops/test_parts.py",
    "ops/test_conv.py",
    "ops/test_gated_norm.py",
    "mixers/test_properties.py",
    "model/test_language_model.py",
    "model/test_loss.py",
    "model/test_experts.py",
)
"""The tests that must pass on every device; with another than the CPU these run and no others."""

CPU = torch.device("cpu")
_chosen = CPU


def device() -> torch.device:
    """The device that the tests run on."""
    return _chosen


class MadeByTests(TorchFunctionMode):
    """Puts the tensors that tests make on a device, with numbers drawn on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.constructors = _device_constructors()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if func in self.constructors and kwargs.get("device") is None and _is_a_test(sys._getframe(1)):
            if generator is None:
                return func(*args, **{**kwargs, "device": self.device})
            needs = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self.device).requires_grad_(needs)
        if (
            generator is not None
            and args
            and isinstance(args[0], Tensor)
            and args[0].device != generator.device
        ):
            # `parameter.normal_(generator=...)` on another device.
            drawn = torch.empty(args[0].shape, dtype=args[0].dtype)
            with torch.no_grad():
                args[0].copy_(func(drawn, *args[1:], **kwargs))
            return args[0]
        return func(*args, **kwargs)


def _is_a_test(frame: Any) -> bool:
    """Whether the code that called PyTorch is that of a test, and not the library's."""
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(TESTS)


def choose(name: str) -> None:
    """Let the tests run on the device `name` from now on.

    Raises:
        pytest.UsageError: there is no such device.
    """
    global _chosen
    try:
        wanted = torch.device(name)
        if wanted.type != "meta":
            torch.zeros(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(
            f"--device {name}: PyTorch cannot use it here ({error})".splitlines()[0]
        ) from None
    _chosen = wanted
    if wanted != CPU:
        MadeByTests(wanted).__enter__()


def is_of_every_device(item: pytest.Item) -> bool:
    """Whether a test must pass on other devices too: it is in FILES and not about the CPU or its kernels."""
    path = Path(item.path).relative_to(TESTS).as_posix()
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    kernels = any(isinstance(value, str) and value.startswith("cpu-") for value in parameters)
    return path in FILES and not kernels and item.get_closest_marker("cpu") is None
