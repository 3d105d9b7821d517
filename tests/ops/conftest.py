"""The implementations that the operators' tests run through."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from intarsia.ops import native

INSTRUCTION_SETS = [] if native.missing_reason() else native.native().available()


NATIVE = [f"cpu-{isa}" for isa in INSTRUCTION_SETS]


# Of module scope, so that hypothesis may call a test's body many times with it.
@pytest.fixture(scope="module", params=["chunked", *NATIVE])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the linear operators, the native one once for every instruction set of this machine."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=["torch", *NATIVE])
def layer_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same of the operators that have one form in PyTorch: the short convolution and the gated norm."""
    yield from chosen(request.param)


def chosen(name: str) -> Iterator[str]:
    """The name of an implementation while its instruction set, behind a dash, is forced."""
    name, _, isa = name.partition("-")
    if not isa:
        yield name
        return
    before = os.environ.get(native.ISA_VARIABLE)
    os.environ[native.ISA_VARIABLE] = isa
    native.instruction_set.cache_clear()
    assert native.instruction_set() == isa
    yield name
    if before is None:
        del os.environ[native.ISA_VARIABLE]
    else:
        os.environ[native.ISA_VARIABLE] = before
    native.instruction_set.cache_clear()
