"""What every test shares: the options of the suite, one thread, a fixed search of hypothesis."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from intarsia.ops import native
from support.device import CPU, choose, device, is_of_every_device

# The same examples on every run, and no deadline: a shared machine has slow minutes.
# HYPOTHESIS_PROFILE=explore searches on, with new examples each time.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("intarsia")
    group.addoption(
        "--trials",
        type=int,
        default=1,
        metavar="N",
        help="how many inputs and weights, drawn anew, the tests of error budgets try",
    )
    group.addoption(
        "--device",
        default="cpu",
        metavar="NAME",
        help="run the tests that must pass on every device on this one, such as cuda, and no others",
    )
    group.addoption(
        "--threads", type=int, default=1, metavar="N", help="PyTorch's threads, which the kernels use too"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist run side by side; one thread each is faster than many that share the cores.
    torch.set_num_threads(config.getoption("--threads"))
    choose(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if device() != CPU:
        left_out = [item for item in items if not is_of_every_device(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_of_every_device(item)]


def pytest_report_header(config: pytest.Config) -> str:
    kernels = native.missing_reason() or f"kernels for {native.instruction_set()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"intarsia: on {device()}; {kernels}; PyTorch's for {capability}; {torch.get_num_threads()} thread(s)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests of error budgets take the seed of their inputs as `trial`."""
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(metafunc.config.getoption("--trials")))
