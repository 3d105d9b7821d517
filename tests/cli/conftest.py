"""A command line that is called as a user calls it, and a small trained model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from intarsia.cli import main
from intarsia.mixers.plugins import VARIABLE

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer" / "learned_decay.py"

RUN_FILE = """
preset = "kimi-linear-nano"

[corpus]
source = "texts/*.txt"
tokenizer = "bytes"

[model]
d_model = 32
depth = 2
layout = "kda mla"

[model.mixers.kda]
num_heads = 2
head_dim = 16

[training]
steps = 6
rows = 2
length = 64
checkpoint_every = 2
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `intarsia` with these arguments, in this process."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


def write_inputs(directory: Path) -> None:
    """A corpus and a run file, small enough for a second of training."""
    random = np.random.default_rng(0)
    (directory / "texts").mkdir()
    for index in range(40):
        words = random.choice(["one", "two", "three", "más", "…"], 60)
        (directory / "texts" / f"{index}.txt").write_text(" ".join(words), encoding="utf-8")
    (directory / "run.toml").write_text(RUN_FILE)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of one's own with a corpus and `run.toml`, which is the current one."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished training run. Not to be written to."""
    directory = tmp_path_factory.mktemp("trained")
    write_inputs(directory)
    before = Path.cwd()
    os.chdir(directory)
    try:
        assert main(["train", "run.toml", "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return directory / "run"


@pytest.fixture
def forget(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A file with a mixer beside the inputs, and how to be a process that has not heard of it."""
    monkeypatch.setenv(VARIABLE, "")
    (inputs / "my_layer.py").write_text(EXAMPLE.read_text())

    def forget() -> None:
        monkeypatch.setenv(VARIABLE, "")
        sys.modules.pop("my_layer", None)

    yield forget
    sys.modules.pop("my_layer", None)
