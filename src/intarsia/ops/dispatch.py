"""Which implementation serves a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops import native
from intarsia.ops.arguments import Arguments
from intarsia.ops.chunked_operator import chunked_anywhere
from intarsia.ops.cpu import cpu, refuse
from intarsia.ops.reference import reference

Run = Callable[[Arguments], tuple[Tensor, "Tensor | None"]]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the linear operators."""

    name: str
    run: Run
    refuse: Callable[[Arguments], str | None]
    """Why it cannot serve a call, or None where it can."""
    automatic: bool = True
    """Whether `impl="auto"` may choose it."""
    fused: bool = False
    """Whether it normalises q and k and applies the gates itself."""


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call and the reason for each that does not."""

    impl: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.impl}: {self.reason}",
            *(f"  not {name}: {why}" for name, why in self.rejected.items()),
        ]
        return "\n".join(lines)


def implementations() -> tuple[Implementation, ...]:
    """All implementations that exist, the fastest first."""
    return (
        Implementation("cpu", cpu, refuse, fused=True),
        Implementation("chunked", chunked_anywhere, lambda call: None),
        Implementation("reference", reference, lambda call: None, automatic=False, fused=True),
    )


NOT_YET = {
    "triton": "Triton kernels are not built yet",
    "fla": "calling flash-linear-attention is not built yet",
}
"""The names that the design promises and that nothing answers to so far."""


def choose(call: Arguments, impl: str = "auto") -> tuple[Implementation, Choice]:
    """Pick the implementation for a call.

    Raises:
        ConfigError: no implementation has that name.
        UnsupportedError: the named implementation cannot serve this call.
    """
    known = implementations()
    if impl == "auto":
        chosen: Implementation | None = None
        rejected = dict(NOT_YET)
        for candidate in known:
            refusal = candidate.refuse(call)
            if refusal is None and candidate.automatic and chosen is None:
                chosen = candidate
            else:
                rejected[candidate.name] = refusal or (
                    "slower" if candidate.automatic else "only runs when named"
                )
        if call.q.device.type == "cpu" and not torch.compiler.is_compiling():
            native.warn_if_missing()
        if chosen is None:
            raise UnsupportedError(f"no implementation serves this call: {rejected}")
        return chosen, Choice(chosen.name, "the fastest that serves this call", rejected)
    for candidate in known:
        if candidate.name == impl:
            refusal = candidate.refuse(call)
            if refusal is not None:
                raise UnsupportedError(f"impl={impl!r} cannot serve this call: {refusal}")
            return candidate, Choice(impl, "it was asked for by name")
    if impl in NOT_YET:
        raise UnsupportedError(
            f"impl={impl!r}: {NOT_YET[impl]}; there are {', '.join(i.name for i in known)}"
        )
    raise ConfigError(f"there is no impl={impl!r}; there are auto, {', '.join(i.name for i in known)}")


def run(call: Arguments, impl: str) -> tuple[Tensor, Tensor | None]:
    """Compute a call by the implementation that `impl` names or that serves it fastest. Errors as `choose`."""
    implementation, _ = choose(call, impl)
    return implementation.run(call if implementation.fused else call.plain())
