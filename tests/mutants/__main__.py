"""Break the code in the ways of `table.py`, one at a time, and see which test notices.

    python tests/mutants                     all of them, two at a time
    python tests/mutants --only loader       those whose name or file has this in it
    python tests/mutants --python            those in Python alone: no compiler
    python tests/mutants --check             only whether each still applies

Each mutant is made in a copy of the tree, never in the checkout, and the tests named with it are run there until one
fails. The exit status is 1 if a mutant survives or no longer applies, or if those tests fail without a mutant.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
CAUGHT, SURVIVED, LOST = "caught", "SURVIVED", "DOES NOT APPLY"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def fault(mutant: Mutant) -> str | None:
    """Why the mutant cannot be made, or None."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"there is no {mutant.file}"
    found = path.read_text(encoding="utf-8").count(mutant.old)
    return None if found == 1 else f"its text occurs {found} times in {mutant.file}"


@dataclass
class Copy:
    """The tree in a directory of its own, with kernels, and what runs its tests."""

    path: Path
    compiles: bool
    """Whether the kernels are compiled here, of one instruction set, and not taken from the environment."""

    @classmethod
    def make(cls, path: Path, compiles: bool) -> Copy:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        # An environment that finds everything of this one but the editable installation: a path in a .pth file adds
        # libraries, and not the .pth files that lie there.
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", path / ".venv"], check=True, capture_output=True
        )
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = path / ".venv" / "lib" / version / "site-packages"
        site.joinpath("all.pth").write_text(f"{path / 'src'}\n{sysconfig.get_path('purelib')}\n")
        copy = cls(path, compiles)
        if compiles:
            copy.configure()
        else:
            installed = Path(sysconfig.get_path("platlib"), "intarsia", "ops")
            for kernels in installed.glob("_native*.so"):
                shutil.copy2(kernels, path / "src/intarsia/ops")
        return copy

    def configure(self) -> None:
        # For no processor in particular: then there is one instruction set, and a mutant compiles one file or two.
        flags = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run(
            [*self.tool("cmake"), "-S", self.path / "csrc", "-B", self.path / "build", "-G", "Ninja",
             f"-DPython_EXECUTABLE={sys.executable}", *flags],
            check=True,
            capture_output=True,
            env=self.environment,
        )  # fmt: skip
        self.compile()

    def compile(self) -> None:
        subprocess.run(
            [*self.tool("cmake"), "--build", self.path / "build"],
            check=True,
            capture_output=True,
            env=self.environment,
        )
        for kernels in (self.path / "build").glob("_native*.so"):
            shutil.copy2(kernels, self.path / "src/intarsia/ops")

    @staticmethod
    def tool(name: str) -> list[str | Path]:
        return [Path(sys.executable).parent / name]

    @property
    def environment(self) -> dict[str, str]:
        tools = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Where libraries are, for what tells them from a user's own code (`intarsia.sources`).
            "PYTHONUSERBASE": sys.prefix,
        }

    def test(self, arguments: list[str], seconds: float) -> tuple[bool, str, float]:
        """Whether the tests pass, what failed first, and how long it took."""
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [
                    self.path / ".venv/bin/python",
                    "-m",
                    "pytest",
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    *arguments,
                ],
                cwd=self.path,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return False, f"not done after {seconds:.0f} s", time.monotonic() - begin
        first = FAILED.search(done.stdout)
        lines = (done.stdout + done.stderr).strip().splitlines()
        what = first.group(1) if first else lines[-1] if lines else f"exit status {done.returncode}"
        # Exit status 5: nothing was selected, which is no test at all.
        passed = done.returncode in (0, 5)
        return passed, "no test was selected" if done.returncode == 5 else what, time.monotonic() - begin

    def try_mutant(self, mutant: Mutant, seconds: float) -> tuple[str, str]:
        """What became of it: caught by which test, or not."""
        path = self.path / mutant.file
        original = path.read_text(encoding="utf-8")
        path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            if mutant.is_compiled:
                try:
                    self.compile()
                except subprocess.CalledProcessError as error:
                    return LOST, f"it does not compile: {error.stdout.decode()[-400:]}"
            passed, what, _ = self.test(mutant.tests.split(), seconds)
            return (SURVIVED, mutant.tests) if passed else (CAUGHT, what)
        finally:
            path.write_text(original, encoding="utf-8")


def baseline(copy: Copy, mutants: list[Mutant]) -> list[str]:
    """The selections of tests that fail, or select nothing, without any mutant."""
    wrong = []
    for tests in sorted({mutant.tests for mutant in mutants}):
        passed, what, _ = copy.test(tests.split(), 900)
        if not passed or what == "no test was selected":
            wrong.append(f"{tests}: {what}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="in the name or the file")
    parser.add_argument("--python", action="store_true", help="no mutants of C++")
    parser.add_argument("--check", action="store_true", help="only whether each still applies")
    parser.add_argument(
        "--no-baseline", action="store_true", help="do not run the tests without mutants first"
    )
    parser.add_argument("-n", "--jobs", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=600, help="after which tests that hang count as failed"
    )
    options = parser.parse_args()

    chosen = [m for m in MUTANTS if options.only in f"{m.name} {m.file}"]
    if options.python:
        chosen = [m for m in chosen if not m.is_compiled]
    results: dict[str, tuple[str, str]] = {}
    for mutant in chosen:
        if reason := fault(mutant):
            results[mutant.name] = LOST, reason
            print(f"{LOST:14} {mutant.name}: {reason}", flush=True)
    if options.check:
        print(f"{len(chosen) - len(results)} of {len(chosen)} mutants apply")
        return bool(results)

    begin = time.monotonic()
    rest = [mutant for mutant in chosen if mutant.name not in results]
    with tempfile.TemporaryDirectory(prefix="intarsia-mutants-") as folder:
        for compiles in (False, True):
            group = [mutant for mutant in rest if mutant.is_compiled == compiles]
            if not group:
                continue
            copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
            for n in range(min(options.jobs, len(group))):
                copies.put(Copy.make(Path(folder, f"{'cxx' if compiles else 'python'}-{n}"), compiles))
            if not options.no_baseline:
                copy = copies.get()
                if wrong := baseline(copy, group):
                    print("without a mutant these fail:\n" + "\n".join(wrong))
                    return 1
                copies.put(copy)

            def work(mutant: Mutant, copies: queue.SimpleQueue[Copy] = copies) -> None:
                copy = copies.get()
                try:
                    result = copy.try_mutant(mutant, options.seconds)
                finally:
                    copies.put(copy)
                results[mutant.name] = result
                print(f"{result[0]:14} {mutant.name} ({mutant.file}): {result[1]}", flush=True)

            with ThreadPoolExecutor(options.jobs) as executor:
                list(executor.map(work, group))
    caught = sum(outcome == CAUGHT for outcome, _ in results.values())
    print(f"{caught} of {len(chosen)} mutants were caught in {time.monotonic() - begin:.0f} s")
    for name, (outcome, why) in results.items():
        if outcome != CAUGHT:
            print(f"  {outcome} {name}: {why}")
    return caught != len(chosen)


if __name__ == "__main__":
    sys.exit(main())
