"""`intarsia compare`: the verb around `intarsia.ladder`, which has its own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

PLAN = """
seeds = [1, 2]

[corpus]
source = "texts/*.txt"
tokenizer = "bytes"
heldout = 0.4

[budget]
steps = 4

[training]
rows = 2
length = 64

[model]
d_model = 32
depth = 2

[matching]
tolerance = 0.05

[tuning]
learning_rates = [4e-3]
documents = 1

[evaluation]
documents = 10
resamples = 1000

[figures]
contexts = [32]
repeats = 1
throughput_steps = 1
sample_tokens = 8

[[arms]]
name = "full"
preset = "full-nano"

[[arms]]
name = "kimi-linear"
preset = "kimi-linear-nano"
model.layout = "kda mla"
"""


@pytest.mark.slow
def test_a_small_comparison(cli: Cli, inputs: Path) -> None:
    for index in range(60):  # enough held-out documents
        (inputs / "texts" / f"more-{index}.txt").write_text(f"text number {index} " * 20)
    (inputs / "plan.toml").write_text(PLAN)
    done = cli("compare", "plan.toml", "--out", "result", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == json.loads((inputs / "result" / "verdict.json").read_text())
    assert (inputs / "result" / "report.html").stat().st_size > 10_000
    done = cli("generate", "result", "x")
    assert done.status == 2
    assert "holds a comparison; choose one of its models" in done.err
    run = done.err.split()[-1]
    assert cli("generate", run, "text", "-n", 5).status == 0


@pytest.mark.slow
def test_a_plugin_is_known_to_the_processes_that_train(
    cli: Cli, inputs: Path, forget: Callable[[], None]
) -> None:
    for index in range(60):  # enough held-out documents
        (inputs / "texts" / f"more-{index}.txt").write_text(f"text number {index} " * 20)
    mine = 'model.mixers.mine = { type = "learned-decay", num_heads = 2, head_dim = 16 }'
    (inputs / "plan.toml").write_text(f"{PLAN.replace('kda mla', 'mine mla')}{mine}\n")
    done = cli("compare", "plan.toml", "--out", "result", "--json", "--plugin", "my_layer.py")
    assert done.status == 0, done.err
    records = [path.read_text() for path in (inputs / "result").glob("runs/*/train/config.json")]
    assert sum("my_layer" in record for record in records) == 2, "of two seeds, and not of the other arm"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no plan file plan.toml"),
        ("seeds = ", "not valid TOML"),
        (PLAN.replace("seeds", "sedes"), "did you mean 'seeds'"),
        (PLAN.replace("full-nano", "full-nana"), "did you mean 'full-nano'"),
    ],
)
def test_wrong_plan(cli: Cli, inputs: Path, content: str | None, message: str) -> None:
    if content is not None:
        (inputs / "plan.toml").write_text(content)
    done = cli("compare", "plan.toml")
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_wrong_numbers_and_places(cli: Cli, inputs: Path) -> None:
    (inputs / "plan.toml").write_text(PLAN)
    assert cli("compare", "plan.toml", "--jobs", 0).status == 2
    (inputs / "taken").write_text("")
    done = cli("compare", "plan.toml", "--out", "taken")
    assert done.status == 2
    assert "taken" in done.err
    assert "Traceback" not in done.err
