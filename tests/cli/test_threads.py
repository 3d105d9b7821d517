"""How threads wait for each other under the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from intarsia.cli.threads import SPINS, wait_briefly


@pytest.mark.parametrize(
    ("before", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_what_was_said_holds(before: dict[str, str], spins: str | None) -> None:
    wait_briefly(before)
    assert before.get("GOMP_SPINCOUNT") == spins


def test_is_said_before_torch_is_imported() -> None:
    code = """if True:
        import os, sys
        from intarsia.cli import main
        code = main(["presets"])
        print(code, os.environ.get("GOMP_SPINCOUNT"))
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines()[-1] == f"0 {SPINS}"
