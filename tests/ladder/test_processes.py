"""Runs whose model several processes train together: the parameters divided among them (FSDP2), connected by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intarsia.errors import ConfigError
from intarsia.jobs.ranks import my_rank, together
from intarsia.ladder import Plan, compare
from intarsia.ladder.comparison import Place, prepare_text
from intarsia.ladder.plan_tables import PlanError
from support.small_corpus import texts

PLAN: dict[str, Any] = {
    "name": "together",
    "seeds": [1],
    "budget": {"steps": 6},
    "corpus": {"tokenizer": "bytes", "heldout": 0.3},
    "training": {"rows": 2, "length": 64, "log_every": 2},
    "tuning": {"learning_rates": [5e-3], "documents": 6},
    "evaluation": {"documents": 12, "tokens_per_document": 100, "resamples": 1000},
    "figures": {"contexts": [], "throughput_steps": 0, "sample_tokens": 0},
    "model": {"d_model": 16, "depth": 1, "feed_forward": {"d_hidden": 48}},
    "arms": [
        {"name": name, "model": {"layout": name, "mixers": {name: {"type": name, "num_heads": 1, "head_dim": 16}}}}
        for name in ("kda", "gdn")
    ],
}  # fmt: skip


def test_two_processes_follow_one(tmp_path: Path) -> None:
    found, corpus = {}, {**PLAN["corpus"], "source": texts(tmp_path / "texts")}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        with (tmp_path / f"{processes}.log").open("w") as log:
            plan = Plan.from_dict({**PLAN, "corpus": corpus, "processes": processes})
            compare(plan, out, jobs=1, console=Console(file=log))
        for path in out.glob("runs/*/spec.json"):
            spec, outcome = (
                json.loads(path.read_text()),
                json.loads((path.parent / "outcome.json").read_text()),
            )
            assert spec["processes"] == processes
            found[spec["arm"], processes] = outcome
    assert len(found) == 4
    for arm in ("kda", "gdn"):
        one, two = found[arm, 1], found[arm, 2]
        assert one["batches"] == two["batches"], "the same rows in the same order"
        assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-4)


def test_a_run_does_not_wait_for_a_process_that_was_lost(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom intarsia.jobs import ranks\nranks.SECONDS_TO_END = 0.2\n"
        "with ranks.together(2, 'intarsia.ladder.worker', Path(sys.argv[1])):\n    time.sleep(100)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "nowhere")], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1
    assert "process 1 ended with exit status 1: the others end, too" in done.stderr
    assert "spec.json" in done.stderr, "why it was lost"


def test_the_environment_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "7")
    with together(2, "this", Path("x")):  # of the standard library: it prints a poem and ends
        assert my_rank() == 0
    assert my_rank() == 0
    assert os.environ["MASTER_PORT"] == "7"
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"processes": 3},
            "processes: 3 processes share the rows of a step, and 2 cannot be divided among them",
        ),
        ({"processes": 0}, "processes must be at least 1"),
        (
            {"processes": 2, "budget": {"seconds": 10}},
            "processes: a budget of seconds is timed in one process: give tokens, steps or FLOPs",
        ),
    ],
)
def test_processes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as failure:
        Plan.from_dict({**PLAN, **changes})
    assert message in str(failure.value)


def test_machines_of_a_cluster_make_runs_of_one_process(tmp_path: Path) -> None:
    plan = Plan.from_dict({**PLAN, "processes": 2})
    place = Place(tmp_path, home=tmp_path, machines=object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="made on this machine alone: leave out --ray"):
        prepare_text(plan, place, None, Console(quiet=True))
    assert not list(tmp_path.iterdir())
