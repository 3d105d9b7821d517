"""The examples in README.md and docs/ are run, so that they cannot go stale.

A fenced block is an example when the word `run` follows its language:

    ```python run     the blocks of one page run in order, in one namespace and one empty directory
    ```bash run       each line is an `intarsia ...` command and must succeed (a trailing backslash
                      continues it)
    ```console run    lines that begin with `$ ` are commands; what follows each is what it must print,
                      where `...` stands for anything
    ```bash run slow  what takes longer, and what needs other libraries' commands: run by bash itself. Python blocks can
                      be slow too. A page with such blocks is run once more, with them, in a test that is marked slow

Other Python blocks are compiled, no more.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "console", "text", "toml", "json", "yaml", "make", "html", "diff", ""}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    runs: bool
    slow: bool
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    opened: tuple[int, str, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"( *)(`{3,})(.*)", line)
        if opened is None:
            if fence:
                opened, lines = (number, *fence.groups()), []
        elif fence and fence[2] == opened[2] and not fence[3].strip():
            start, indent, _, info = opened
            language, *words = info.split() or [""]
            text = "\n".join(part.removeprefix(indent) for part in lines) + "\n"
            yield Block(page, start, language, "run" in words, "slow" in words, text)
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page.name}:{opened[0]}: a fenced block is not closed"


def commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """The commands of a block, each with what it must print (None: anything)."""
    joined = block.text.replace("\\\n", " ")
    if block.language == "console":
        for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed if printed.strip() else None
    else:
        for line in joined.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line, None


def run_command(command: str, expected: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Run `intarsia ...` in this process."""
    from intarsia.cli import main

    program, *arguments = shlex.split(command, comments=True)
    assert program == "intarsia", f"only intarsia commands can be run, not {command!r}"
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, f"`{command}` ended with {status}:\n{err}"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if expected is not None and not doctest.OutputChecker().check_output(expected, out, flags):
        raise AssertionError(f"`{command}` printed\n{out}\nand the page says\n{expected}")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


SLOW = [page for page in PAGES if any(block.slow for block in blocks(page))]


@pytest.fixture
def run_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path, bool], None]:
    """Runs the examples of a page in an empty directory, the slow ones too if asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    module = types.ModuleType("__example__")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(page: Path, slow: bool) -> None:
        for block in blocks(page):
            if not block.runs or (block.slow and not slow):
                continue
            if block.language == "python":
                # Blank lines in front make a traceback name the line of the page.
                code = compile("\n" * block.line + block.text, str(page), "exec")
                exec(code, vars(module))
                continue
            assert block.language in {"bash", "console"}, (
                f"{page.name}:{block.line}: cannot run {block.language}"
            )
            if block.slow:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True
                )
                assert done.returncode == 0, f"{page.name}:{block.line}:\n{done.stdout}\n{done.stderr}"
                continue
            for command, expected in commands(block):
                run_command(command, expected, capsys)

    return run


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_run(page: Path, run_page: Callable[[Path, bool], None]) -> None:
    run_page(page, False)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("lm_eval", "trl", "datasets"))), reason="the extra `ecosystem` is not installed"
)
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_slow_examples_run(page: Path, run_page: Callable[[Path, bool], None]) -> None:
    run_page(page, True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_well_formed(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: unknown language {block.language!r}"
        if block.language == "python":
            compile(block.text, where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(
        r"^( *)(`{3,}).*?^\1\2", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        path = page.parent / target.partition("#")[0]
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        assert os.path.commonpath([path.resolve(), ROOT]) == str(ROOT), f"{page.name} links out of the tree"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [
        p.name for p in PAGES if p.parent.name == "docs" and p.name != "README.md" and p.name not in index
    ]
    assert not missing, f"docs/README.md does not mention {missing}"
