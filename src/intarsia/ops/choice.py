"""An implementation of an operator, and how the one that serves a call is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops.pools import InSlots

AUTO = "auto"


def serves_all(call: Any) -> None:
    """Nothing is refused."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operator: a row of the table (`intarsia.ops.table`).

    `call` is what the operator's own `..._call` function makes of checked arguments, for instance a `LinearCall`.
    """

    name: str
    run: Callable[[Any], Any]
    """From a call to the operator's results."""
    refuse: Callable[[Any], str | None] = serves_all
    """Why it cannot serve a call, or None where it can."""
    automatic: bool = True
    """Whether `impl="auto"` may choose it."""
    rounding: str | None = None
    """What it rounds besides what the others round, or None."""
    fused: bool = False
    """Whether it does in one pass what its caller could leave to several operators."""
    passed_over: Callable[[str], None] | None = None
    """Is told the refusal where `impl="auto"` would have chosen it."""
    yields: Callable[[Any], str | None] = serves_all
    """Why `impl="auto"` leaves a call that it can serve to the next one, or None."""
    in_slots: Callable[[Any, InSlots], Tensor | None] | None = None
    """Runs a call without initial state on states where they stand, and returns the outputs; None where it cannot."""


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call and the reason for each that does not."""

    impl: str
    reason: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None
    """What it rounds besides what the others round, or None."""

    def __str__(self) -> str:
        lines = [
            f"{self.impl}: {self.reason}" + ("" if self.rounding is None else f"; it rounds {self.rounding}"),
            *(f"  not {name}: {why}" for name, why in self.rejected.items()),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Operator:
    """An operator by its name, and what can compute it, the fastest first."""

    name: str
    implementations: tuple[Implementation, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    """The names of implementations that only other operators have, or none yet, and why this one does not."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.implementations)

    def choose(self, call: Any, impl: str = AUTO) -> Implementation:
        """The implementation for a call.

        Raises:
            ConfigError: no implementation has that name.
            UnsupportedError: the named implementation cannot serve this call, or none can.
        """
        if impl != AUTO:
            named = self._named(impl)
            if (refusal := named.refuse(call)) is not None:
                raise UnsupportedError(f"impl={impl!r} cannot serve this call of {self.name}: {refusal}")
            return named
        for each in self.implementations:
            if not each.automatic:
                continue
            refusal = each.refuse(call)
            if refusal is None and each.yields(call) is None:
                return each
            if refusal is not None and each.passed_over is not None:
                each.passed_over(refusal)
        raise UnsupportedError(f"no implementation serves this call of {self.name}: {self._refusals(call)}")

    def explain(self, call: Any, impl: str = AUTO) -> Choice:
        """The same, with reasons. Errors as `choose`."""
        chosen = self.choose(call, impl)
        if impl != AUTO:
            return Choice(chosen.name, "it was asked for by name", rounding=chosen.rounding)
        others = {
            each.name: each.refuse(call)
            or each.yields(call)
            or ("slower" if each.automatic else "only runs when named")
            for each in self.implementations
            if each is not chosen
        }
        rejected = {**others, **self.absent}
        return Choice(chosen.name, "the fastest that serves this call", rejected, chosen.rounding)

    def _named(self, impl: str) -> Implementation:
        for each in self.implementations:
            if each.name == impl:
                return each
        there = f"there are {', '.join((AUTO, *self.names))}"
        if impl in self.absent:
            raise UnsupportedError(f"impl={impl!r}: {self.absent[impl]}; {there}")
        raise ConfigError(f"{self.name} has no impl={impl!r}; {there}")

    def _refusals(self, call: Any) -> Mapping[str, str | None]:
        return {each.name: each.refuse(call) for each in self.implementations if each.automatic}


def table(rows: Mapping[str, Iterable[Implementation]], not_yet: Mapping[str, str]) -> Mapping[str, Operator]:
    """Operators by name. Each knows the others' implementations, and those that there are `not_yet`, as absent."""
    found = {operator: tuple(each) for operator, each in rows.items()}
    everywhere = dict.fromkeys(each.name for rows in found.values() for each in rows)
    operators = {}
    for operator, implementations in found.items():
        own = {each.name for each in implementations}
        absent = {name: f"{operator} has none" for name in everywhere if name not in own}
        operators[operator] = Operator(operator, implementations, {**absent, **not_yet})
    return operators
