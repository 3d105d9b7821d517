"""What every test shares: the options of the suite, one thread, a fixed search of hypothesis."""

from __future__ import annotations

import os
from zlib import crc32

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
    group.addoption("--every", type=int, default=1, metavar="N", help="run a sample: one test of N")


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist run side by side; one thread each is faster than many that share the cores.
    torch.set_num_threads(config.getoption("--threads"))
    choose(config.getoption("--device"))


# Last, when what a mark or a word leaves out is out.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if device() == CPU or is_of_every_device(item)]
    # By a sum of the name: every n-th in their order might be all of one parameter.
    kept = [item for item in kept if crc32(item.nodeid.encode()) % config.getoption("--every") == 0]
    if len(kept) < len(items):
        there = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in there])
        items[:] = kept


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
