"""The suite's device: what tests make goes there, what the library makes does not."""

from __future__ import annotations

import pytest
import torch

from intarsia.mixers import KDAConfig
from support.device import FILES, TESTS, MadeByTests, choose


def test_what_tests_make_is_put_on_the_device() -> None:
    layer = KDAConfig(2, 8).build(16)
    with MadeByTests(torch.device("meta")):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        made = [torch.zeros(2), torch.tensor([1, 2]), torch.arange(3), torch.rand(2, dtype=torch.float64)]
        built = KDAConfig(2, 8).build(16)
        layer.to("meta").q_proj.weight.data.normal_(generator=torch.Generator())
    assert all(x.is_meta for x in [drawn, *made])
    assert drawn.requires_grad
    assert drawn.is_leaf
    assert made[-1].dtype == torch.float64
    assert all(parameter.device.type == "cpu" for parameter in built.parameters())
    assert torch.zeros(2).device.type == "cpu"


def test_the_numbers_are_those_of_the_cpu() -> None:
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    with MadeByTests(torch.device("cpu")):
        got = torch.randn(3, generator=torch.Generator().manual_seed(0))
        moved = torch.empty(3).normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, expected)
    assert torch.equal(moved, expected)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(pytest.UsageError, match="--device nothing: PyTorch cannot use it here"):
        choose("nothing")


def test_the_tests_that_must_run_there_exist(request: pytest.FixtureRequest) -> None:
    assert [name for name in FILES if not (request.config.rootpath / "tests" / name).is_file()] == []
    assert str(request.config.rootpath / "tests") == TESTS
