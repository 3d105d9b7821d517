"""What is compared, whether it is right, and what is left out."""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from torch import Tensor

from delta_rule import Call, Inputs, ours
from intarsia.errors import UnsupportedError
from intarsia.ops import explain, gated_delta_rule

Row = dict[str, Any]
REFERENCE_LENGTH = 512
"""How long an input the float64 reference, one token at a time, still runs in a moment."""
WRONG = {"float32": 1e-3, "bfloat16": 2e-2}
"""The relative error (root mean square) from which on an output is wrong and its time means nothing."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def checked_error(name: str, actual: Tensor, expected: Tensor, dtype: str) -> float:
    error = relative_error(actual.reshape(expected.shape), expected)
    if not error < WRONG[dtype]:
        raise RuntimeError(f"{name} is wrong: its relative error is {error:.2g} in {dtype}")
    return error


def exact(x: Inputs) -> tuple[Call, Inputs]:
    """The implementation and the inputs that tell what is right."""
    impl = "reference" if x["q"].shape[1] <= REFERENCE_LENGTH else "chunked"
    return ours(impl), {name: tensor.double() for name, tensor in x.items()}


def refusal(x: Inputs, impl: str) -> str | None:
    """Why one of ours does not serve this call, or None where it does."""
    try:
        explain(gated_delta_rule, x["q"], x["k"], x["v"], x["g"], x["beta"], impl=impl)
    except UnsupportedError as error:
        return str(error)
    return None


@cache
def leave_out(line: str) -> None:
    """Say what is left out and why, once."""
    print(f"  left out: {line}")


def our_implementations(x: Inputs, options: argparse.Namespace) -> dict[str, str]:
    """Those of ours that serve this call, the fastest first."""
    found = {}
    for impl in ("cpu", "chunked"):
        name = f"intarsia {impl}"
        if skipped(name, options):
            continue
        if why := refusal(x, impl):
            leave_out(f"{name}: {why}")
        else:
            found[name] = impl
    if not found:
        raise UnsupportedError("none of our implementations is left to compare with")
    return found


def skipped(name: str, options: argparse.Namespace) -> bool:
    return any(word in name for word in options.skip.split(",") if word)
