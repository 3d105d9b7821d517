"""The kernels of flash-linear-attention on a CPU, by Triton's interpreter, against the operators' reference.

    TRITON_INTERPRET=1 python tests/support/fla_interpreter.py NAME ...

prints for each case its name, the function that served it and the largest error of outputs, states and gradients, as a
share of the largest number. Slow: every program of a grid is a loop in Python.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from intarsia.ops import Gate, Sequences, linear_fla
from intarsia.ops.linear_call import LinearCall, linear_call
from intarsia.ops.linear_reference import reference
from support.linear_inputs import linear_inputs


class _NoDriver:
    """Without a GPU the interpreter still asks Triton's driver how to measure: not at all, the first is best."""

    def get_benchmarker(self) -> Any:
        return lambda run, **_: [1.0, 1.0, 1.0]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class _Number(int):
    """A loop's counter: in compiled kernels it is a value with a type."""

    def to(self, dtype: Any) -> _Number:
        return self


def _count(*bounds: Any) -> Any:
    return (_Number(n) for n in range(*(int(b) for b in bounds)))


def call_of(
    rule: str, decay: str, *, T: int = 70, packed: bool = False, gate: str = "", group: int = 1
) -> LinearCall:
    """A call with states; `packed` into three sequences, of which one is empty."""
    inputs = linear_inputs(B=1, T=T, H=1, HV=group, K=16, V=16, decay=decay)
    inputs = {name: None if x is None else x.float() for name, x in inputs.items()}
    options: dict[str, Any] = {}
    if rule != "delta":
        inputs.pop("beta")
    if rule == "general":
        inputs["a"], inputs["b"] = 0.5 * inputs["k"], inputs["k"].clone()
    if packed:
        options["cu_seqlens"] = Sequences((T // 3, 0, T - T // 3))
        inputs["initial_state"] = torch.cat([(n + 1) * inputs["initial_state"] for n in range(3)])
    if gate:
        channels = group * 16 if decay == "channel" else group
        options["gate"] = Gate(
            torch.full((group,), 0.2), torch.linspace(-1, 1, channels), -4.0 if gate == "bounded" else None
        )
        options["normalize"] = True
        if rule == "delta":
            options["beta_max"] = 2.0
    return linear_call(**inputs, **options, output_final_state=True)


CASES: dict[str, LinearCall] = {}
for _rule, _decays in (
    ("delta", ("none", "fixed", "head", "channel")),
    ("additive", ("none", "fixed", "head", "channel")),
):
    for _decay in _decays:
        CASES[f"{_rule} {_decay}"] = call_of(_rule, _decay)
        CASES[f"{_rule} {_decay} few"] = call_of(_rule, _decay, T=5, group=2)
for _decay in ("none", "channel"):
    CASES[f"general {_decay} few"] = call_of("general", _decay, T=5, group=2)
for _decay in ("head", "channel"):
    for _gate in ("softplus", "bounded"):
        CASES[f"delta {_decay} {_gate}"] = call_of("delta", _decay, gate=_gate, group=2)
        CASES[f"delta {_decay} {_gate} few"] = call_of("delta", _decay, gate=_gate, T=5, group=2)
    CASES[f"delta {_decay} packed"] = call_of("delta", _decay, packed=True)
    CASES[f"additive {_decay} packed few"] = call_of("additive", _decay, packed=True, T=7)


for _rule in ("delta", "additive", "general"):
    for _decay in ("none", "fixed", "head", "channel"):
        CASES[f"{_rule} {_decay} packed long"] = call_of(_rule, _decay, packed=True, T=200)
for _decay, _gate in (("head", "softplus"), ("channel", "softplus"), ("channel", "bounded")):
    CASES[f"delta {_decay} {_gate} packed long"] = call_of(
        "delta", _decay, packed=True, gate=_gate, T=200, group=2
    )


GRADIENTS = {"delta channel", "delta head softplus", "additive head", "additive channel"}
"""Of these the gradients are compared, too."""


def gradients(
    call: LinearCall, run: Callable[[LinearCall], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, ...]:
    """Outputs, state, and the gradients of all inputs of one number that depends on both."""
    names = [n for n in ("q", "k", "v", "g", "beta", "initial_state") if getattr(call, n) is not None]
    leaves = {n: getattr(call, n).clone().requires_grad_() for n in names}
    o, state = run(replace(call, **leaves))
    assert state is not None
    loss = (o * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() + state.square().sum()
    return o.detach(), state.detach(), *torch.autograd.grad(loss, list(leaves.values()))


def error(got: Tensor, expected: Tensor) -> float:
    return float(
        (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    )


def main(names: list[str]) -> None:
    import triton.runtime.driver

    triton.runtime.driver.set_active(_NoDriver())
    linear_fla.functions()
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops.") and "chunk" in name:
            module.range = _count  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    for name in names or CASES:
        call = CASES[name]
        function, _ = linear_fla.translate(call)
        try:
            got = linear_fla.compute(call, linear_fla.functions())
        except Exception as why:  # of whatever the interpreter cannot do
            print(f"{name}\t{function}\tnot interpreted: {why!r:.90}", flush=True)
            continue
        if name in GRADIENTS:
            got, expected = (
                gradients(call, linear_fla.fla),
                gradients(call, reference),
            )
        else:
            expected = reference(call)
        worst = max(
            error(a, b) for a, b in zip(got, expected, strict=True) if a is not None and b is not None
        )
        print(f"{name}\t{function}\t{worst:.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
