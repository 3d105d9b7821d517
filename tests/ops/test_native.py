"""The C++ kernels as an installed module: there, missing, broken, and forced to an instruction set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intarsia.ops import native
from intarsia.ops.swiglu import swiglu

compiled = pytest.mark.skipif(native.missing_reason() is not None, reason="installed without the C++ kernels")

# What Python is left with when the module was not installed, and when a library that it needs is not there.
MISSING = "import sys; sys.modules['intarsia.ops._native'] = None\n"
BROKEN = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "intarsia.ops._native":
            raise ImportError("libgomp.so.1: cannot open shared object file", name=name)
sys.meta_path.insert(0, Broken())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: what `native` finds it keeps."""
    env = {k: v for k, v in os.environ.items() if k != native.ISA_VARIABLE}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | environment)


@compiled
def test_uses_the_best_instruction_set() -> None:
    available = native.native().available()
    assert available[-1] == "portable"
    done = run("from intarsia.ops.native import instruction_set; print(instruction_set())")
    assert done.stdout.strip() == available[0], done.stderr


@compiled
def test_the_environment_forces_an_instruction_set() -> None:
    code = "from intarsia.ops.native import instruction_set; print(instruction_set())"
    assert run(code, INTARSIA_CPU_ISA="portable").stdout.strip() == "portable"
    wrong = run(code, INTARSIA_CPU_ISA="avx1024")
    assert wrong.returncode != 0
    names = ", ".join(native.native().available())
    assert f"ConfigError: INTARSIA_CPU_ISA='avx1024': there are {names} here" in wrong.stderr


@pytest.mark.parametrize(
    ("best", "maker", "fastest"),
    [
        ("avx512_bf16", "GenuineIntel", "avx512"),
        ("avx512_bf16", "AuthenticAMD", "avx512_bf16"),
        ("avx512_bf16", "", "avx512_bf16"),
        ("amx", "GenuineIntel", "amx"),
        ("avx2", "GenuineIntel", "avx2"),
    ],
)
def test_chunks_take_pairs_where_those_are_fast(best: str, maker: str, fastest: str) -> None:
    assert native.fastest_for_chunks(best, maker) == fastest


@compiled
def test_chunks_take_what_is_forced_and_else_what_the_maker_says() -> None:
    code = "from intarsia.ops.native import *; print(chunk_instruction_set(), native().maker())"
    for isa in native.native().available():
        assert run(code, INTARSIA_CPU_ISA=isa).stdout.split()[0] == isa
    chosen, _, maker = run(code).stdout.strip().partition(" ")
    assert chosen == native.fastest_for_chunks(native.native().available()[0], maker)
    if Path("/proc/cpuinfo").exists() and "vendor_id" in Path("/proc/cpuinfo").read_text():
        assert f"vendor_id\t: {maker}" in Path("/proc/cpuinfo").read_text()


def test_the_environment_switches_the_kernels_off() -> None:
    done = run(
        "import torch\n"
        "from intarsia.ops import explain, linear_attention, native\n"
        "x = torch.zeros(1, 1, 1, 4)\n"
        "linear_attention(x, x, x)\n"
        "print(explain(linear_attention, x, x, x).impl, native.missing_reason())\n",
        INTARSIA_CPU_ISA="off",
    )
    assert done.stdout.startswith("chunked the C++ kernels are switched off by INTARSIA_CPU_ISA=off"), (
        done.stderr
    )
    assert "UserWarning" not in done.stderr


@compiled
def test_nothing_is_missing(recwarn: pytest.WarningsRecorder) -> None:
    assert native.missing_reason() is None
    native.warn_if_missing()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("setup", "reason"),
    [(MISSING, "were not compiled"), (BROKEN, "do not load (libgomp.so.1: cannot open shared object file)")],
    ids=["missing", "broken"],
)
def test_says_what_is_wrong_and_what_to_do(setup: str, reason: str) -> None:
    code = setup + (
        "from intarsia.errors import UnsupportedError\n"
        "from intarsia.ops.native import instruction_set, missing_reason, native\n"
        "for call in (native, instruction_set):\n"
        "    try:\n"
        "        call()\n"
        "    except UnsupportedError as error:\n"
        "        assert str(error) == missing_reason()\n"
        "    else:\n"
        "        raise AssertionError\n"
        "print(missing_reason())\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    assert "INTARSIA_NATIVE=required" in done.stdout


def test_warns_once() -> None:
    code = MISSING + (
        "import warnings; warnings.simplefilter('always')\n"
        "from intarsia.ops.native import warn_if_missing\n"
        "for _ in range(3): warn_if_missing()\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1


def test_the_operators_import_without_loading_the_kernels() -> None:
    done = run("import sys, intarsia.ops; sys.exit('intarsia.ops._native' in sys.modules)")
    assert done.returncode == 0, done.stderr


@compiled
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="processors of another kind lose no time"
)
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-20), (torch.float64, 1e-160)])
def test_numbers_too_small_for_all_their_digits_are_zero_in_kernels_alone(
    rows: int, dtype: torch.dtype, tiny: float
) -> None:
    """Each costs an Intel processor a hundred cycles. Other operators of the thread keep them."""
    number = torch.full((rows, 512), tiny, dtype=dtype)
    assert (number * number > 0).all()
    assert (swiglu(number, number, impl="torch") > 0).all()
    assert (swiglu(number, number, impl="cpu") == 0).all()
    assert (swiglu(number, -number / tiny, impl="cpu") == -tiny / 2).all()
    assert (number * number > 0).all()
