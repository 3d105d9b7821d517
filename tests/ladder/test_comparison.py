"""A whole small comparison, for real: training in child processes, failures, resuming, measuring, judging."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from intarsia.errors import ConfigError, TrainingError
from intarsia.ladder import Plan, Verdict, compare
from intarsia.ladder.fairness import check_batches
from intarsia.ladder.run_folder import RunFolder
from support.small_corpus import texts

STEPS = 12

PLAN: dict[str, Any] = {
    "name": "small",
    "seeds": [1, 2],
    "budget": {"steps": STEPS},
    "corpus": {"tokenizer": "bytes", "heldout": 0.3},
    "training": {"rows": 2, "length": 64, "checkpoint_every": 4, "log_every": 2},
    "tuning": {"learning_rates": [5e-3], "documents": 6},
    "evaluation": {"documents": 12, "tokens_per_document": 100, "resamples": 1000},
    "figures": {
        "contexts": [16, 80],
        "decode_tokens": 2,
        "repeats": 1,
        "throughput_steps": 1,
        "sample_tokens": 8,
        "prompts": ["ab"],
    },
    "model": {
        "d_model": 16,
        "depth": 2,
        "mixers": {
            "mla": {"num_heads": 1, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
            "kda": {"num_heads": 1, "head_dim": 8},
        },
        "feed_forward": {"d_hidden": 48},
    },
    "matching": {"reference": "hybrid"},
    "arms": [
        {"name": "full", "preset": "full-nano", "learning_rates": [5e-3, 1e-2]},
        {"name": "hybrid", "preset": "kimi-linear-nano", "model": {"layout": "kda mla"}},
        # Its loss leaves the finite numbers after a few steps.
        {"name": "wild", "preset": "full-nano", "learning_rates": [1e35]},
    ],
}


def run(plan: dict[str, Any], directory: Path, jobs: int = 2) -> tuple[Verdict, str]:
    with (directory.parent / f"{directory.name}.log").open("w+") as file:
        verdict = compare(Plan.from_dict(plan), directory, jobs=jobs, console=Console(file=file, width=120))
        file.seek(0)
        return verdict, file.read()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def plan(place: Path) -> dict[str, Any]:
    corpus = {**PLAN["corpus"], "source": texts(place / "texts")}
    return {**PLAN, "corpus": corpus}


@pytest.fixture(scope="module")
def done(place: Path, plan: dict[str, Any]) -> tuple[Verdict, str, dict[str, Any]]:
    """The verdict of an undisturbed comparison, what it printed, and verdict.json."""
    verdict, printed = run(plan, place / "undisturbed")
    return verdict, printed, json.loads((place / "undisturbed" / "verdict.json").read_text())


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What of verdict.json must not depend on how often the comparison was stopped."""

    def without_clocks(value: Any) -> Any:
        if isinstance(value, dict):
            clocks = {"seconds", "measurements", "environment", "report"}
            # A verdict that was made while a run was missing stays on record.
            clocks |= {"history", "look", "notes"}
            return {key: without_clocks(item) for key, item in value.items() if key not in clocks}
        return [without_clocks(item) for item in value] if isinstance(value, list) else value

    return without_clocks(found)


def arm(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in found["arms"] if arm["name"] == name)


def test_it_judges_the_arms_that_finished(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    verdict, printed, found = done
    assert {row.name for row in verdict.rows} == {"full", "hybrid", "wild", "unigram", "bigram"}
    for name in ("full", "hybrid"):
        row = verdict.row(name)
        assert row.estimate.seeds == 2
        assert 1 < row.estimate.value < 8
    judged = next(pair for pair in verdict.pairs if {pair.first, pair.second} == {"full", "hybrid"})
    assert judged.seeds == (1, 2)
    assert verdict.sentence in re.sub(r"\s*│?\n│?\s*", " ", printed)
    assert found["sentence"] == verdict.sentence


def test_parameters_are_matched_and_counted(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    counts = [arm["non_embedding_parameters"] for arm in done[2]["arms"]]
    assert max(counts) / min(counts) < 1.021, "each within 1 % of the reference"
    assert all(arm["parameters"] - arm["non_embedding_parameters"] == 257 * 16 for arm in done[2]["arms"])
    assert "feed_forward.d_hidden 48 →" in arm(done[2], "full")["change"]


def test_learning_rates_are_chosen_apart(done: tuple[Verdict, str, dict[str, Any]], place: Path) -> None:
    full = arm(done[2], "full")
    best = min(full["tuning"], key=full["tuning"].get)
    assert f"{full['learning_rate']:g}" == best
    runs = {role: [r for r in full["runs"] if r["role"] == role] for role in ("tuning", "judged")}
    assert {r["seed"] for r in runs["tuning"]} == {0}
    assert [r["seed"] for r in runs["judged"]] == [1, 2]
    assert {r["learning_rate"] for r in runs["judged"]} == {full["learning_rate"]}

    def documents(r: dict[str, Any]) -> set[int]:
        with np.load(place / "undisturbed" / "runs" / r["directory"] / "evaluation.npz") as arrays:
            return set(arrays["documents"].tolist())

    tuning, judged = documents(runs["tuning"][0]), documents(runs["judged"][0])
    assert len(tuning) >= 2
    assert len(judged) >= 6
    assert not tuning & judged


def test_the_next_rate_is_tried_where_the_best_is_at_the_end(
    done: tuple[Verdict, str, dict[str, Any]],
) -> None:
    full = arm(done[2], "full")
    beyond = full["rates_beyond_grid"]
    # Of two rates either is at an end. So short a run wants more than it is given.
    assert beyond == [2e-2, 4e-2]
    assert set(full["tuning"]) == {"0.005", "0.01", "0.02", "0.04"}
    assert "full did best with 0.01, at the end of its grid: trying 0.02" in done[1]


def test_arms_of_a_seed_saw_the_same_batches(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    by_seed: dict[int, set[str]] = {}
    for one in (arm(done[2], "full"), arm(done[2], "hybrid")):
        for r in one["runs"]:
            by_seed.setdefault(r["seed"], set()).add(r["batches"])
    assert all(len(digests) == 1 for digests in by_seed.values())
    assert len(set.union(*by_seed.values())) == 3, "another seed, another order"


def test_other_batches_are_noticed(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    from intarsia.ladder.results import RunResult

    runs = []
    for name in ("full", "hybrid"):
        r = next(r for r in arm(done[2], name)["runs"] if r["role"] == "judged" and r["seed"] == 1)
        source = place / "undisturbed" / "runs" / r["directory"] / "train" / "metrics.jsonl"
        target = tmp_path / r["directory"] / "train" / "metrics.jsonl"
        target.parent.mkdir(parents=True)
        target.write_text(source.read_text())
        runs.append(RunResult(name, r["learning_rate"], 1, "judged", directory=r["directory"]))
    check_batches(runs, tmp_path)
    lines = target.read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "batches": "0" * 64})
    target.write_text("\n".join(lines) + "\n")
    with pytest.raises(TrainingError, match=f"saw different batches up to step {STEPS}"):
        check_batches(runs, tmp_path)


def test_a_run_that_diverges_is_counted_and_shown(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    verdict, printed, found = done
    failures = [r["failure"] for r in arm(found, "wild")["runs"]]
    assert [failure["kind"] for failure in failures] == ["diverged", "diverged"]
    assert "step" in failures[0]["message"]
    assert "wild finished no run and is not judged" in verdict.sentence
    runs = sum(len(one["runs"]) for one in found["arms"])
    assert f"2 of {runs} runs failed" in printed


def test_costs_are_measured(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    for one in done[2]["arms"]:
        measured = one["measurements"]
        assert [cost["context"] for cost in measured["decoding"]] == [16, 80]
        assert all(cost["milliseconds"] > 0 for cost in measured["decoding"])
        low, high = measured["training_range"]
        assert 0 < low <= measured["training_tokens_per_second"] <= high
        assert all(
            cost["range"][0] <= cost["milliseconds"] <= cost["range"][1] for cost in measured["decoding"]
        )
    full, hybrid = (
        [cost["cache_bytes"] for cost in arm(done[2], name)["measurements"]["decoding"]]
        for name in ("full", "hybrid")
    )
    assert full == [2 * 12 * 4 * context for context in (16, 80)], "two layers of 8 + 4 latents in float32"
    assert hybrid[1] - hybrid[0] == 12 * 4 * 64, "one layer of latents; the other's state does not grow"


def test_loss_is_known_by_position(done: tuple[Verdict, str, dict[str, Any]]) -> None:
    found = done[2]
    assert found["judged_context"] == 64
    for run in arm(found, "hybrid")["runs"]:
        positions = run["positions"]
        assert [(place["start"], place["stop"]) for place in positions] == [
            (0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64),
        ]  # fmt: skip
        assert positions[0]["bits_per_token"] > positions[-1]["bits_per_token"], (
            "bytes of a word follow each other"
        )


def test_there_is_a_report_and_a_plan(done: tuple[Verdict, str, dict[str, Any]], place: Path) -> None:
    from intarsia.ladder import load_plan

    page = (place / "undisturbed" / "report.html").read_text()
    assert done[0].sentence in page
    assert str(place / "undisturbed" / "report.html") in done[1]
    assert load_plan(place / "undisturbed" / "plan.toml").seeds == (1, 2)


def test_what_is_done_is_not_done_again(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, plan: dict[str, Any]
) -> None:
    runs = place / "undisturbed" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/outcome.json")}
    began = time.monotonic()
    verdict, _ = run(plan, place / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/outcome.json")} == before
    assert (verdict.sentence, verdict.pairs) == (done[0].sentence, done[0].pairs)
    found = json.loads((place / "undisturbed" / "verdict.json").read_text())
    assert numbers(found) == numbers(done[2])
    assert time.monotonic() - began < 20, "nothing was trained"


def test_the_order_in_which_runs_end_changes_no_digit(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, plan: dict[str, Any]
) -> None:
    """The first seed of one arm is made last, when all others are there already."""
    directory = place / "late"
    shutil.copytree(place / "undisturbed", directory)
    runs = [r for r in arm(done[2], "full")["runs"] if r["role"] == "judged"]
    assert [r["seed"] for r in runs] == [1, 2]
    shutil.rmtree(directory / "runs" / runs[0]["directory"])
    verdict, _ = run(plan, directory)
    assert verdict.pairs == done[0].pairs
    assert numbers(json.loads((directory / "verdict.json").read_text())) == numbers(done[2])


def start(plan: dict[str, Any], directory: Path) -> subprocess.Popen[bytes]:
    """The comparison in a process of its own."""
    code = (
        "import json, sys; from intarsia.ladder import Plan, compare;"
        "compare(Plan.from_dict(json.loads(sys.argv[1])), sys.argv[2], jobs=2)"
    )
    arguments = [sys.executable, "-c", code, json.dumps(plan), str(directory)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_numbers(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, plan: dict[str, Any]
) -> None:
    directory = place / "killed"
    first = start(plan, directory)
    wait_for(lambda: list(directory.glob("runs/*/train/checkpoints/step-*")), first)
    orphans = children(first)
    assert orphans
    first.kill()
    first.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < deadline, "children outlived their parent"
        time.sleep(0.05)
    assert not (directory / "verdict.json").exists()
    run(plan, directory)
    assert numbers(json.loads((directory / "verdict.json").read_text())) == numbers(done[2])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_saves_and_goes_on(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, plan: dict[str, Any], number: signal.Signals
) -> None:
    directory = place / f"stopped-{number.name}"
    first = start(plan, directory)
    wait_for(lambda: list(directory.glob("runs/*/train/metrics.jsonl")), first)
    running = children(first)
    first.send_signal(number)
    assert first.wait(timeout=120) != 0
    assert b"KeyboardInterrupt" in first.stderr.read()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)
    assert not list(directory.glob("runs/*/failure.json")), "to be stopped is not to fail"
    run(plan, directory)
    assert numbers(json.loads((directory / "verdict.json").read_text())) == numbers(done[2])


@pytest.mark.slow
def test_a_run_that_is_killed_is_counted_and_tried_again(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, plan: dict[str, Any]
) -> None:
    directory = place / "short-of-memory"
    first = start(plan, directory)
    wait_for(lambda: list(directory.glob("runs/*/train/metrics.jsonl")), first)
    os.kill(children(first)[0], signal.SIGKILL)
    first.wait(timeout=240)
    found = json.loads((directory / "verdict.json").read_text())
    failures = [r["failure"] for one in found["arms"] for r in one["runs"] if r["failure"]]
    killed = [failure for failure in failures if failure["kind"] == "killed"]
    assert len(killed) == 1
    assert "signal 9 (SIGKILL)" in killed[0]["message"]
    run(plan, directory)
    assert numbers(json.loads((directory / "verdict.json").read_text())) == numbers(done[2])


def test_two_comparisons_do_not_share_a_directory(place: Path, plan: dict[str, Any]) -> None:
    import fcntl

    directory = place / "taken"
    directory.mkdir()
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another comparison is at work"):
            run(plan, directory)


def test_a_run_directory_belongs_to_one_run(done: tuple[Verdict, str, dict[str, Any]], place: Path) -> None:
    from dataclasses import replace

    from intarsia.errors import CheckpointError
    from intarsia.ladder.run_spec import RunSpec

    path = next((place / "undisturbed" / "runs").iterdir())
    spec = RunSpec.load(path)
    assert path.name == spec.directory_name
    RunFolder(path).claim(spec)
    other = replace(spec, learning_rate=spec.learning_rate * 2)
    assert other.directory_name != spec.directory_name
    with pytest.raises(CheckpointError, match="holds another run"):
        RunFolder(path).claim(other)


MIXER = Path(__file__).parents[2] / "examples" / "new_mixer" / "learned_decay.py"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a mixer that is not of this package, which every process finds by its entry point."""
    name = "decay_that_changes"
    file = tmp_path / f"{name}.py"
    file.write_text(MIXER.read_text().replace('"learned-decay"', f'"{name}"'))
    metadata = tmp_path / "stranger-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[intarsia.mixers]\n{name} = {name}:LearnedDecayConfig\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    importlib.invalidate_caches()
    return file


def test_changed_code_makes_new_runs_and_says_what_changed(
    place: Path, plan: dict[str, Any], stranger: Path, tmp_path: Path
) -> None:
    def scores(directory: Path, changed: str = "") -> tuple[dict[str, set[str]], dict[str, float], str]:
        verdict, printed = run(short, directory)
        assert ("made anew" in printed) is bool(changed)
        assert changed in re.sub(r"\s+", " ", printed)
        found = json.loads((directory / "verdict.json").read_text())
        runs = {one["name"]: {r["directory"] for r in one["runs"]} for one in found["arms"]}
        return runs, {row.name: row.estimate.value for row in verdict.rows if row.estimate}, printed

    short = {
        **plan,
        "seeds": [1],
        "budget": {"steps": 2},
        "figures": {"contexts": [], "throughput_steps": 0, "sample_tokens": 0},
        "matching": {"tolerance": 0.2},
        "baselines": "none",
        "arms": [
            {"name": "known", "preset": "kimi-linear-nano"},
            {
                "name": "strange",
                "preset": "kimi-linear-nano",
                "model": {
                    "layout": "mine mla",
                    "mixers": {"mine": {"type": stranger.stem, "num_heads": 1, "head_dim": 8}},
                },
            },
        ],
    }
    runs, first, _ = scores(tmp_path / "out")
    text = stranger.read_text()
    stranger.write_text(text.replace("half of the past is gone", "HALF of the past is gone"))
    assert scores(tmp_path / "out")[:2] == (runs, first), "a comment changes nothing"
    stranger.write_text(text.replace("uniform_(2, 6", "uniform_(-6, -2"))
    again, second, _ = scores(tmp_path / "out", changed=f"the code of {stranger.stem} changed")
    assert again["known"] == runs["known"]
    assert not again["strange"] & runs["strange"]
    assert second["known"] == first["known"]
    assert second["strange"] != first["strange"]
    record = json.loads((tmp_path / "out" / "verdict.json").read_text())["environment"]
    assert record["code"]["known"] != record["code"]["strange"]
    assert record["arithmetic"]["PyTorch"]


def test_code_that_changes_while_runs_wait_is_refused(
    done: tuple[Verdict, str, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    """A run that was planned with one version of the code is not made with another."""
    from dataclasses import replace

    from intarsia.jobs.child import CRASHED
    from intarsia.ladder.run_spec import RunSpec

    spec = RunSpec.load(next((place / "undisturbed" / "runs").iterdir()))
    code = {**spec.fingerprint["code"], "intarsia.mixers.mla": "0" * 16}
    stale = replace(spec, fingerprint={**spec.fingerprint, "code": code})
    (tmp_path / "spec.json").write_text(json.dumps(stale.to_dict()))
    ended = subprocess.run(
        [sys.executable, "-m", "intarsia.ladder.worker", str(tmp_path)], capture_output=True
    )
    assert ended.returncode == CRASHED
    failure = RunFolder(tmp_path).read_failure()
    assert failure is not None
    assert not failure.is_final, "the next start makes new runs"
    assert "the code of intarsia.mixers.mla changed" in failure.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [PLAN["arms"][1], {"name": "b", "preset": "fool-nano"}]}, "did you mean .full-nano"),
        ({"model": {"vocab_size": 17}}, "model.vocab_size must be that of the tokenizer"),
        ({"model": {"depht": 17}}, "depth"),
        ({"matching": {"adjust": False, "tolerance": 0.001}}, "forbids changes"),
        ({"training": {"rows": 2, "length": 64, "warmup_steps": 12}}, "warmup_steps"),
    ],
)
def test_plans_that_cannot_be_carried_out(
    place: Path, plan: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run({**plan, **changes}, place / "impossible")
