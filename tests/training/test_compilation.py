"""Runs whose blocks are compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from intarsia.errors import ConfigError
from intarsia.training import TrainResult, read_metrics, train
from intarsia.training.compilation import telling_what_cannot_be_compiled
from intarsia.training.config import FREE_FIELDS
from support.device import device


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_run_is_the_run(model_config, train_config, dataset, tmp_path, recompute) -> None:
    config = train_config.replace(
        steps=6, eval_every=None, eval_documents=0, checkpoint_every=3, activation_checkpointing=recompute
    )

    def losses(name, **changes):
        directory = tmp_path / name
        result = train(
            model_config, config.replace(**changes), dataset, None, directory, device=str(device())
        )
        assert isinstance(result, TrainResult)
        assert result.finished
        return np.array([line["loss"] for line in read_metrics(directory / "metrics.jsonl")])

    plain, compiled, again = losses("plain"), losses("one", compile=True), losses("two", compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)
    assert np.array_equal(compiled, again), "to the bit"


def test_compiling_may_change_when_a_run_goes_on() -> None:
    assert "compile" in FREE_FIELDS


def test_what_cannot_be_compiled_is_told() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def branching(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(ConfigError, match=r"cannot be compiled: .+ \(--no-compile\)"):  # noqa: SIM117
        with telling_what_cannot_be_compiled():
            branching(torch.ones(2))


@pytest.mark.cpu
def test_without_a_compiler_it_says_what_to_install(tmp_path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"some words that are the text {name} " * 100)
    command = [
        sys.executable, "-m", "intarsia", "train", "kimi-linear-nano", "--compile", "--corpus", "*.txt",
        "--tokenizer", "bytes", "--steps", "1", "--set", "training.rows=1", "--set", "training.length=32",
        "--set", "training.eval_documents=0",
    ]  # fmt: skip
    nowhere = {**os.environ, "CXX": "no-such-compiler", "PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=nowhere, capture_output=True, text=True)
    assert done.returncode != 0
    assert "compile=true needs a C++ compiler" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
