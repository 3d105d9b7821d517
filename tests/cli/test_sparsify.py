"""`intarsia sparsify`: a trained run becomes sparse, and mistakes are told before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
SHORT = (
    "--corpus", "texts/*.txt", "--warm-up-steps", 3, "--steps", 3, "--set", "sparse.eval_documents=4",
    "--set", "warm_up.log_every=1", "--set", "sparse.log_every=1",
)  # fmt: skip


def test_a_run_becomes_sparse(cli: Cli, inputs: Path) -> None:
    for index in range(200):  # of which some are held out
        (inputs / "texts" / f"more-{index}.txt").write_text(" ".join([f"{index}", "one", "two"] * 20))
    assert cli("train", "run.toml").status == 0
    done = cli("sparsify", "runs/run", "--to", "dsa", *SHORT, "--json")
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    assert facts["finished"]
    assert list(facts["heldout"]) == ["before", "warmed_up", "sparse"]
    assert facts["heldout"]["before"]["lost"] is None
    for name in ("warmed_up", "sparse"):
        score = facts["heldout"][name]
        assert score["lost"]["low"] <= score["lost"]["value"] <= score["lost"]["high"]
        differs = score["bits_per_byte"] - facts["heldout"]["before"]["bits_per_byte"]
        assert score["lost"]["value"] == pytest.approx(differs, abs=1e-12)
    assert 0 < facts["picked_share"]["warm_up"] < 1
    stage = json.loads((inputs / "runs" / "run-dsa" / "train" / "config.json").read_text())
    assert stage["model"]["layout"] == "kda dsa"
    assert stage["model"]["mixers"]["dsa"]["top_k"] == 8  # an eighth of the run's rows
    assert stage["train"]["rows"] == 2  # and all that is not said is the run's, its rate a tenth
    assert stage["train"]["lr"] == pytest.approx(2e-4)
    table = cli("sparsify", "runs/run", "--to", "dsa", *SHORT)
    assert table.status == 0, table.err
    assert "after the warm-up" in table.out
    assert "after the sparse stage" in table.out
    assert cli("generate", "runs/run-dsa", "one", "--max-tokens", 2).status == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "moba"), "can become dsa, qsa, msa"),
        (
            ("--to", "qsa"),
            "qsa is made of attention, and the model has no such layer: its layers are kda, mla",
        ),
        (("--to", "dsa", "--set", "indexer.top=3"), "--set indexer.top=3"),
        (("--to", "dsa", "--set", "warm_up.lr=-1"), "--set warm_up.lr=-1"),
        (("--to", "dsa", "--set", "lr=1"), "--set takes indexer.NAME, warm_up.NAME or sparse.NAME"),
        (("--to", "dsa", "--set", "sparse.length=9"), "rows of one length"),
        (("--to", "dsa", "--corpus", "nowhere/*.txt"), "nowhere"),
        (("--to", "dsa", "--out", "run"), "holds a training run"),
        (("--to", "dsa", "--device", "abacus"), "abacus"),
        (("--to", "dsa", "--set", "sparse.trains=indexers"), "first indexers are trained alone"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(trained.parent)
    before = set(trained.parent.rglob("*"))
    done = cli("sparsify", "run", *SHORT, *arguments)
    assert done.status == 2
    assert told in done.err
    assert "Traceback" not in done.err
    written = set(trained.parent.rglob("*")) - before
    assert not [path for path in written if "cache" not in path.parts]


def test_a_run_that_is_not_finished_is_told(cli: Cli, inputs: Path) -> None:
    done = cli("sparsify", "runs/nothing", "--to", "dsa")
    assert done.status == 2
    assert "runs/nothing" in done.err
