"""`intarsia train`: files, overrides, resumption and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from intarsia.data import TokenDataset

Cli = Callable[..., Any]


def test_train_and_train_again(cli: Cli, inputs: Path) -> None:
    done = cli("train", "run.toml")
    assert done.status == 0, done.err
    assert "6 steps" in done.out
    assert "bits per byte" in done.out
    assert (inputs / "runs" / "run" / "model" / "model.safetensors").exists()
    again = cli("train", "run.toml", "--json")
    facts = json.loads(again.out)
    assert facts["finished"]
    assert facts["tokens"] == 6 * 2 * 64
    assert facts["heldout"]["bits_per_byte"] > 0


def test_overrides(cli: Cli, inputs: Path) -> None:
    done = cli(
        "train", "run.toml", "--out", "other", "--json", "--tokens", "1k", "--tokenizer", "bpe:300",
        "--set", "training.rows=4", "-s", "model.depth=1", "-s", "training.qk_clip=none",
    )  # fmt: skip
    assert done.status == 0, done.err
    # 1000 tokens of 4 x 64 a step, rounded up.
    assert json.loads(done.out)["step"] == 4
    config = json.loads((inputs / "other" / "config.json").read_text())
    assert config["model"]["depth"] == 1
    assert config["data"]["tokenizer"] == "bpe:300"
    assert config["train"]["qk_clip"] is None


WHOLE = """
corpus = { source = "texts/*.txt", tokenizer = "bytes", heldout = 0.3 }
training = { steps = 2, rows = 2, length = 64 }

[model]
d_model = 32
depth = 2
layout = "gla mine"
feed_forward.d_hidden = 32
mixers.gla = { type = "gla", num_heads = 2, head_dim = 16 }
mixers.mine = { type = "mla", num_heads = 2, kv_rank = 16, nope_dim = 8, rope_dim = 8, v_dim = 8 }
"""


def test_a_whole_model_needs_no_preset(cli: Cli, inputs: Path) -> None:
    (inputs / "whole.toml").write_text(WHOLE)
    done = cli("train", "whole.toml", "--json")
    assert done.status == 0, done.err
    config = json.loads((inputs / "runs" / "whole" / "config.json").read_text())
    assert config["model"]["layout"] == "gla mine"
    assert config["model"]["vocab_size"] == 257, "of the tokenizer"
    (dataset,) = [TokenDataset(path.parent) for path in (inputs / "cache").glob("*/dataset.json")]
    assert 6 < dataset.heldout.documents < 18, "of 40, and by default 2"
    (inputs / "whole.toml").write_text(WHOLE.replace("feed_forward.d_hidden = 32", ""))
    assert "whole.toml:5: model.feed_forward is missing" in cli("train", "whole.toml").err


def test_another_run_in_the_same_directory(cli: Cli, inputs: Path) -> None:
    assert cli("train", "run.toml").status == 0
    done = cli("train", "run.toml", "-s", "training.lr=1e-4")
    assert done.status == 2
    assert "train.lr" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kimi-tiny"], "did you mean 'kimi-linear-tiny'"),
        (["none.toml"], "there is no file none.toml"),
        (["run.toml", "--steps", "5", "--tokens", "1k"], "not both"),
        (["run.toml", "--steps", "0"], "steps"),
        (["run.toml", "--tokens", "lots"], "such as 5000"),
        (["run.toml", "--set", "training.lr"], "name=value"),
        (["run.toml", "--set", "trainng.lr=1"], "did you mean 'training'"),
        (["run.toml", "--set", "training.lrr=1"], "training.lrr: unknown option; did you mean 'lr'"),
        (["run.toml", "--set", "training.lr=fast"], "lr must be a finite number"),
        (["run.toml", "--set", "training.steps=many"], "steps must be a whole number"),
        (["run.toml", "--set", "training.length=wide", "--tokens", "1k"], "length must be a whole number"),
        (["run.toml", "--set", "model.dept=1"], "did you mean 'depth'"),
        (["run.toml", "--set", "model.layout=kda mlaa"], "did you mean 'mla'"),
        (["run.toml", "--set", "model.depth.more=1"], "single value"),
        (["run.toml", "--set", "preset=3"], "preset"),
        (["run.toml", "--set", "model.mixers.kda.num_heads=2.5"],
         "--set model.mixers.kda.num_heads=2.5: model.mixers.kda.num_heads must be a whole number; got 2.5 (float)"),
        (["run.toml", "--set", "model.mixers.kda.negative_eigenvalues=no"], "must be true or false; got 'no'"),
        (["run.toml", "--set", "model.mixers.kad.num_heads=2"], "no mixer 'kad'; did you mean 'kda'"),
        (["run.toml", "--set", "training.tensorboard=maybe"], "true or false"),
        (["run.toml", "--corpus", "nothing/*.txt"], "nothing/*.txt"),
        (["run.toml", "--corpus", ""], ""),
        (["run.toml", "--tokenizer", "bpe:x"], "bpe:4096"),
        (["run.toml", "--tokenizer", "words"], "'bytes'"),
        (["run.toml", "--device", "tpu9"], "tpu9"),
        (["run.toml", "--device", "cuda:77"], "cuda"),
        (["run.toml", "--limit-bytes", "-5"], "such as 5000"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input(cli: Cli, inputs: Path, arguments: list[str], message: str) -> None:
    done = cli("train", *arguments, "--out", "new")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (inputs / "new" / "model").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("preset = ", "not valid TOML"),
        ("[training]\nsteps = 3", "a preset is missing, or a [model] table"),
        ("preset = 'full-nano'\n[corpus]\nsorce = 'x'", "did you mean 'source'"),
        ("preset = 'full-nano'\ntraining = 3", "wrong.toml:2: training must be a table"),
        (
            "preset = 'full-nano'\n[training]\nlr = 1e-3\nrow = 3",
            "wrong.toml:4: training.row: unknown option; did",
        ),
        (
            "preset = 'full-nano'\n[training]\nlr = 'x'",
            "wrong.toml:3: training.lr must be a finite number; got 'x'",
        ),
        (
            "preset = 'full-nano'\n[model]\ndepth = 2\n[model.mixers.mla]\nnum_heads = 2.5",
            "wrong.toml:5: model.mixers.mla.num_heads must be a whole number; got 2.5",
        ),
        (
            "preset = 'full-nano'\n[model.mixers.mal]\nnum_heads = 2",
            "wrong.toml:2: model.mixers.mal: the model has no mixer 'mal'; did you mean 'mla'?",
        ),
        (
            "preset = 'full-nano'\n[model]\nfeed_forward.d_hiden = 3",
            "wrong.toml:3: model.feed_forward.d_hiden: unknown option",
        ),
        (
            "preset = 'full-nano'\n[model.mixers.mla]\nrotate = 'null'",
            "wrong.toml:3: model.mixers.mla.rotate must be",
        ),
    ],
)
def test_wrong_file(cli: Cli, inputs: Path, content: str, message: str) -> None:
    (inputs / "wrong.toml").write_text(content)
    done = cli("train", "wrong.toml")
    assert done.status == 2
    assert message in done.err


def test_out_is_a_file(cli: Cli, inputs: Path) -> None:
    (inputs / "taken").write_text("")
    done = cli("train", "run.toml", "--out", "taken")
    assert done.status == 2
    assert "taken" in done.err
    assert "Traceback" not in done.err


def test_a_longer_run_branches_off(cli: Cli, inputs: Path) -> None:
    """`--from` with nothing else said has the settings of the parent, the warm-up among them."""
    assert cli("train", "run.toml", "-s", "training.lr=1e-3", "--steps", "40", "--out", "short").status == 0
    done = cli("train", "run.toml", "--from", "short", "--steps", "80", "--json")
    assert done.status == 0, done.err
    assert "Going on from step 32 of short with train.steps 6 → 80" not in done.err
    assert "Going on from step 32 of short with train.steps 40 → 80." in done.err
    assert json.loads(done.out)["directory"] == "short-branch"
    record = json.loads((inputs / "short-branch" / "config.json").read_text())
    assert record["lineage"]["run"] == "short"
    assert (record["train"]["lr"], record["train"]["warmup_steps"]) == (1e-3, 2)
    again = cli("train", "run.toml", "--from", "short", "--steps", "80", "--json")
    assert json.loads(again.out) == json.loads(done.out)

    refused = cli("train", "run.toml", "-s", "training.lr=1e-3", "--steps", "80", "--out", "short")
    assert refused.status == 2
    assert "--from short@STEP" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere"], "nowhere holds no training run"),
        (["--from", "run@"], "RUN or RUN@STEP"),
        (["--from", "run@1"], "holds no checkpoint of step 1; there are: 4, 5"),
        (["--from", "run@4", "--steps", "3"], "would end at step 3"),
        (["--from", "run", "--out", "run"], "a directory of its own"),
        (["--from", "run", "-s", "model.depth=1"], "model.depth: 2 in the run, 1 now (another model)"),
        (["--from", "run", "-s", "training.rows=4"], "another order of the data"),
        (["--from", "run", "-s", "training.lr=fast"], "--set training.lr=fast: training.lr must be"),
        (["--from", "run", "--corpus", "texts/1*.txt"], "data.fingerprint"),
    ],
    ids=str,
)
def test_wrong_branches(cli: Cli, trained: Path, inputs: Path, arguments: list[str], message: str) -> None:
    (inputs / "run").symlink_to(trained)
    done = cli("train", "run.toml", *([] if "--out" in arguments else ["--out", "new"]), *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (inputs / "new").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_told_in_one_message(inputs: Path, name: str) -> None:
    """In a process of its own, as PyTorch prints tracebacks past Python."""
    train = [sys.executable, "-m", "intarsia", "train", "run.toml", "-s", "training.steps=2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        train, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(inputs / "runs" / "run" / "checkpoints", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    newest = max((inputs / "runs" / "run" / "checkpoints").iterdir())
    if name == ".metadata":
        (newest / name).unlink()
    else:
        content = bytearray((newest / name).read_bytes())
        content[4000:8000] = bytes(4000)
        (newest / name).write_bytes(content)
    done = subprocess.run(train, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"{newest.relative_to(inputs)} is damaged: {name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "is sound: remove" in done.stderr


def test_interrupted_and_resumed(cli: Cli, inputs: Path) -> None:
    """A real process, Ctrl-C in the middle of the run, the same command again: the same model as undisturbed."""
    arguments = ["train", "run.toml", "-s", "training.steps=60", "--json", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "intarsia", *arguments, "stopped"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(inputs / "stopped" / "checkpoints", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not json.loads(out)["finished"]
    assert "same command goes on" in err

    assert json.loads(cli("inspect", "stopped", "--json").out)["d_model"] == 32
    refused = cli("generate", "stopped")
    assert refused.status == 2
    assert "not finished" in refused.err

    for directory in ("stopped", "undisturbed"):
        assert cli(*arguments, directory).status == 0
    weights = [
        load_file(inputs / name / "model" / "model.safetensors") for name in ("stopped", "undisturbed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def wait_for(checkpoints: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoints.is_dir() and any(path.name.startswith("step-") for path in checkpoints.iterdir()):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint came: {process.communicate(timeout=10)}")
