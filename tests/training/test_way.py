"""The way of a training token: from `train` to the kernel and back through few files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import intarsia
from intarsia.training.trainer import Trainer

PACKAGE = Path(intarsia.__file__).parent


class Way:
    """The package's files that calls in a block go through."""

    def __init__(self) -> None:
        self.executed: set[str] = set()
        self.stacks: dict[str, list[str]] = {}
        """For each file the others that its first call came through, the outermost first."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (name := _name(frame)) is None or name in self.executed:
            return
        self.executed.add(name)
        above, caller = [], frame.f_back
        while caller is not None:
            if (file := _name(caller)) is not None and file not in above:
                above.insert(0, file)
            caller = caller.f_back
        self.stacks[name] = above


def _name(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


@contextmanager
def followed(way: Way) -> Iterator[None]:
    sys.setprofile(way)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture
def way(run, train_config, monkeypatch) -> Way:
    """Of the third step of a run, in which nothing is made for the first time."""
    way, step = Way(), Trainer._step

    def follow(trainer: Trainer, *arguments: Any) -> None:
        if trainer.tally.step != 2:
            return step(trainer, *arguments)
        with followed(way):
            return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", follow)
    run(train_config.replace(steps=3, eval_documents=0, checkpoint_every=None))
    return way


@pytest.mark.cpu
def test_a_token_passes_few_files_on_its_way_to_the_kernel(way) -> None:
    # What each adds: begin or go on; the loop; the step; embedding, loss; residual stream; layer; operator.
    expected = [
        "training/start_or_resume.py", "training/trainer.py", "training/learner.py", "model/language_model.py",
        "model/block.py", "mixers/kda.py", "ops/linear.py",
    ]  # fmt: skip
    kernel = next(file for file in ("ops/linear_cpu.py", "ops/chunked.py") if file in way.executed)
    passed = way.stacks[kernel]
    assert [file for file in passed if file in expected] == expected
    # With the command line before them and the kernel behind.
    assert 1 + len(passed) + 1 <= 12, passed


@pytest.mark.cpu
def test_the_step_of_training_stands_in_few_files(way) -> None:
    assert sorted(file for file in way.executed if file.startswith("training/")) == [
        "training/distributed.py", "training/learner.py", "training/metrics.py", "training/muon.py",
        "training/optimizers.py", "training/qk_clip.py", "training/schedule.py", "training/trainer.py",
    ]  # fmt: skip
