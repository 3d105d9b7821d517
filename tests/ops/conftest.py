"""The implementations that the operators' tests run through."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from intarsia.ops import native
from intarsia.ops.available import available
from support.device import device

INSTRUCTION_SETS = [] if native.missing_reason() else native.native().available()


def all_of(operator: str) -> list[str]:
    """The implementations in an operator's row of the table that can run here, without the reference; the native one
    once for every instruction set of this machine: `cpu-avx2`."""
    names = []
    for name in available(operator, device()):
        if name == "reference":
            continue
        names += [f"{name}-{isa}" for isa in INSTRUCTION_SETS] if name == "cpu" else [name]
    return names


# Of module scope, so that hypothesis may call a test's body many times with it.
@pytest.fixture(scope="module", params=all_of("gated_delta_rule"))
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the delta rule and the additive rule."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=all_of("decode_step"))
def step_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the decode step."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=[f"cpu-{isa}" for isa in INSTRUCTION_SETS])
def native_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native implementation on each instruction set."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=all_of("short_convolution"))
def layer_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the short convolution and the gated norm."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=all_of("softmax_gradient"))
def softmax_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the softmax over logits."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=all_of("swiglu"))
def swiglu_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the gated activation."""
    yield from chosen(request.param)


def chosen(name: str) -> Iterator[str]:
    """The name of an implementation while its instruction set, behind a dash, is forced."""
    name, _, isa = name.partition("-")
    if not isa:
        yield name
        return
    before = os.environ.get(native.ISA_VARIABLE)
    os.environ[native.ISA_VARIABLE] = isa
    _forget()
    assert native.instruction_set() == isa
    assert native.chunk_instruction_set() == isa
    yield name
    if before is None:
        del os.environ[native.ISA_VARIABLE]
    else:
        os.environ[native.ISA_VARIABLE] = before
    _forget()


def _forget() -> None:
    """Have the instruction sets chosen again."""
    native.instruction_set.cache_clear()
    native.chunk_instruction_set.cache_clear()
