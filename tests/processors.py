"""Run the numeric tests as other processors would: with their instruction sets and with several threads.

    python tests/processors.py              all of them, and the tests of error budgets with 20 draws of inputs
    python tests/processors.py --quick      a sample of the tests of error budgets, on three that have little in common
    python tests/processors.py --list

PyTorch's own kernels (`ATEN_CPU_CAPABILITY`), oneDNN's (`ONEDNN_MAX_CPU_ISA`) and ours (`INTARSIA_CPU_ISA`) can be
told to leave out instructions that the machine has: then they sum in another order and round at other places, as
on a machine without them. What a machine does not have cannot be added, but for AMX: our kernels can emulate it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from intarsia.ops import native

NUMERIC = [
    "tests/ops",
    "tests/mixers",
    "tests/model",
    "tests/inference",
    "tests/integrations",
]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
BUDGETS = ["tests/ops", "tests/mixers", "tests/integrations", "-k", "budget or agree"]


@dataclass(frozen=True)
class Processor:
    aten: str | None
    """PyTorch's capability; None: the machine's."""
    onednn: str | None
    kernels: str
    """Our instruction set, or off."""
    threads: int
    every: int | None = None
    """One of so many budgets is a quick sample; None: no sample of it."""

    @property
    def environment(self) -> dict[str, str]:
        named = {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            native.ISA_VARIABLE: self.kernels,
        }
        return {name: value for name, value in named.items() if value}


# Each value of each variable at least once, together as processors have them.
PROCESSORS = {
    "sse4.1": Processor("default", "SSE41", "portable", 1, every=2),
    "avx2": Processor("avx2", "AVX2", "avx2", 2),
    "avx2 without kernels": Processor("avx2", "AVX2", native.OFF, 1, every=1),
    "avx512": Processor(None, "AVX512_CORE", "avx512", 2),
    "avx512_bf16": Processor(None, None, "avx512_bf16", 1),
    "amx emulated": Processor(None, "AVX512_CORE", "amx_emulated", 2, every=5),
    "amx": Processor(None, None, "amx", 1),
    "this one without kernels": Processor(None, None, native.OFF, 2),
}


def run(name: str, processor: Processor, what: list[str]) -> tuple[bool, str]:
    """Whether the tests passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "--threads", str(processor.threads), *what]
    print(f"\n=== {name}: {processor.environment} {' '.join(command[2:])}", flush=True)
    done = subprocess.run(
        command,
        # Threads that wait for each other awake keep what else runs here from ending.
        env={"OMP_WAIT_POLICY": "passive", **os.environ, **ONE_THREAD, **processor.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-1:] if done.returncode == 0 else lines[-40:]), flush=True)
    return done.returncode == 0, lines[-1] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a sample of the budgets, on a sample of the processors"
    )
    parser.add_argument(
        "--trials", type=int, default=20, help="draws of inputs for the budgets (not --quick); 0: none"
    )
    parser.add_argument("--only", metavar="NAME", help="one processor of --list")
    parser.add_argument("--list", action="store_true")
    parser.add_argument(
        "-n", "--jobs", type=int, default=2, help="cores for workers of pytest and their threads"
    )
    options = parser.parse_args()

    available = [] if native.missing_reason() else native.native().available()
    results: list[tuple[str, bool, str]] = []
    for name, processor in PROCESSORS.items():
        if options.list:
            print(f"{name:26} {processor.threads} thread(s)  {processor.environment}")
            continue
        if (options.only or name) != name or (options.quick and processor.every is None):
            continue
        if processor.kernels not in (native.OFF, *available):
            results.append((name, True, f"left out: there is no {processor.kernels} here"))
            continue
        begin = time.monotonic()
        # Workers whose threads fight for the cores take ten times as long.
        workers = ["-n", str(max(1, options.jobs // processor.threads)), "-m", "not slow"]
        runs = [[*BUDGETS, *workers, "--every", str(processor.every)]]
        if not options.quick:
            runs = [[*NUMERIC, *workers]]
            if options.trials:
                runs.append([*BUDGETS, *workers, "--trials", str(options.trials)])
        for what in runs:
            passed, line = run(name, processor, what)
            results.append((name, passed, f"{line} ({time.monotonic() - begin:.0f} s)"))
    for name, passed, line in results:
        print(f"{'passed' if passed else 'FAILED'}  {name:26} {line}")
    return not all(passed for _, passed, _ in results)


if __name__ == "__main__":
    sys.exit(main())
