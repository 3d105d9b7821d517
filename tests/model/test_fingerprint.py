"""What decides a run's numbers beside its configuration, and what does not."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.mixers import KDAConfig
from intarsia.model import FeedForwardConfig, ModelConfig, presets
from intarsia.model.fingerprint import arithmetic, changes, commits, fingerprint
from intarsia.ops import native

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer"


def config(**mixers: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        d_model=16,
        depth=2,
        layout=" ".join(mixers),
        mixers=mixers,  # type: ignore[arg-type]
        feed_forward=FeedForwardConfig(32),
    )


def test_it_holds_the_mixers_that_are_used_and_what_they_are_made_of() -> None:
    found = fingerprint(presets.get("kimi-linear-nano", vocab_size=64)).code
    for module in (
        "mixers.kda",
        "layers.decoding",
        "layers.gates",
        "mixers.mla",
        "ops.chunked",
        "ops.linear_cpu",
    ):
        assert f"intarsia.{module}" in found
    for module in ("model.language_model", "model.block", "model.loss", "training.learner", "data.loader"):
        assert f"intarsia.{module}" in found
    for module in ("mixers.rwkv7", "mixers.registry", "cli.train", "ladder.verdict", "jobs.progress"):
        assert f"intarsia.{module}" not in found
    assert not any(name.startswith(("torch", "numpy")) for name in found)


def test_a_mixer_that_is_listed_and_not_used_does_not_count() -> None:
    from intarsia.mixers import RWKV7Config

    alone = config(kda=KDAConfig(num_heads=1, head_dim=8))
    listed = alone.replace(mixers={**alone.mixers, "rwkv7": RWKV7Config(num_heads=2, head_dim=8)})
    assert fingerprint(alone) == fingerprint(listed)
    assert fingerprint(alone) != fingerprint(listed.replace(layout="kda rwkv7"))


def test_the_mixer_of_a_stranger_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (EXAMPLE / "learned_decay.py").read_text()
    mixer = tmp_path / "strange_decay.py"
    mixer.write_text(source.replace("import torch\n", "import torch, typer, strange_helping\n", 1))
    (tmp_path / "strange_helping.py").write_text("FACTOR = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    strange = importlib.import_module("strange_decay").LearnedDecayConfig(num_heads=1, head_dim=8)
    before = fingerprint(config(strange=strange)).to_dict()
    assert {"strange_decay", "strange_helping", "intarsia.layers.recurrent"} <= set(before["code"])
    assert "typer" in before["versions"], "the libraries of a foreign mixer decide its numbers"
    mixer.write_text(mixer.read_text() + "\n# A remark.\n")
    assert changes(before, fingerprint(config(strange=strange)).to_dict()) == []
    (tmp_path / "strange_helping.py").write_text("FACTOR = 2.0\n")
    after = fingerprint(config(strange=strange)).to_dict()
    assert changes(before, after) == ["the code of strange_helping changed"]


def test_the_kernels_and_their_instruction_set_count() -> None:
    environment = {**os.environ, "INTARSIA_CPU_ISA": "off", "ATEN_CPU_CAPABILITY": "default"}
    code = "import json; from intarsia.model.fingerprint import arithmetic; print(json.dumps(arithmetic()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"kernels": "off", "PyTorch": "DEFAULT"}


@pytest.mark.skipif(native.missing_reason() is not None, reason="there are no kernels")
def test_the_kernels_are_known_by_their_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isa, file = arithmetic()["kernels"].split()
    assert isa == native.instruction_set()
    assert file == hashlib.sha256(Path(native.native().__file__).read_bytes()).hexdigest()[: len(file)]
    other = tmp_path / "other.so"
    other.write_bytes(b"compiled anew")
    monkeypatch.setattr(native.native(), "__file__", str(other))
    assert arithmetic()["kernels"].split()[0] == isa
    assert arithmetic()["kernels"].split()[1] != file


def test_differences_are_told_in_words() -> None:
    before = {
        "versions": {"torch": "2.12.0", "python": "3.11.7"},
        "arithmetic": {"kernels": "avx2 00"},
        "code": {"a": "1", "b": "2", "d": "4"},
        "commits": {"intarsia": "1234"},
    }
    now = {
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "arithmetic": {"kernels": "off"},
        "code": {"a": "1", "b": "3", "c": "4"},
        "commits": {"intarsia": "5678"},
    }
    assert changes(before, now) == [
        "torch was 2.12.0, is 2.13.0",
        "kernels was avx2 00, is off",
        "the code of b changed",
        "the code of c takes part now",
        "the code of d takes part no more",
    ]
    assert changes(now, {**now, "commits": {}}) == [], "a commit may change what takes no part"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_what_git_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    git("init", "-q")
    for name in ("kept_package/__init__.py", "kept_package/part.py", "kept_module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("X = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "Begin")
    (tmp_path / "loose_module.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ["kept_package", "kept_module", "loose_module", "nowhere"]
    head = git("rev-parse", "HEAD")
    assert commits(wanted) == {"kept_package": head, "kept_module": head}
    (tmp_path / "kept_package" / "part.py").write_text("X = 2\n")
    assert commits(wanted) == {"kept_package": f"{head} and changes", "kept_module": head}
