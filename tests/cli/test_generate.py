"""`intarsia generate`: where prompts come from, what goes where, and mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_text_on_stdout_and_speed_on_stderr(cli: Cli, trained: Path) -> None:
    done = cli("generate", trained, "one two", "-n", 12)
    assert done.status == 0, done.err
    assert done.out.startswith("one two")
    assert "prompt of 8 tokens" in done.err
    assert "tokens/s" in done.err
    assert "state" in done.err


def test_packed_weights(cli: Cli, trained: Path) -> None:
    plain, narrow = (
        json.loads(cli("generate", trained, "one", "-n", 3, "--json", *options).out)
        for options in ([], ["--weights", "bfloat16"])
    )
    assert narrow["weight_bytes"] <= plain["weight_bytes"]
    assert narrow["state_bytes"] == plain["state_bytes"] > 0
    wrong = cli("generate", trained, "one", "--weights", "int3")
    assert wrong.status != 0
    assert "int8, int4; got 'int3'" in wrong.err


def test_prompt_from_file_and_stdin_is_the_same(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("one más", encoding="utf-8")
    argument = cli("generate", trained, "one más", "--seed", 3).out
    assert cli("generate", trained, "--file", tmp_path / "prompt.txt", "--seed", 3).out == argument
    monkeypatch.setattr("sys.stdin", io.StringIO("one más"))
    assert cli("generate", trained, "-", "--seed", 3).out == argument
    assert cli("generate", trained, "one más", "--seed", 4).out != argument


def test_json(cli: Cli, trained: Path) -> None:
    facts = json.loads(cli("generate", trained, "one", "-n", 5, "--json").out)
    assert facts["prompt"] == "one"
    assert facts["prompt_tokens"] == 4
    assert facts["tokens"] <= 5
    assert isinstance(facts["text"], str)


def test_greedy_ignores_the_seed(cli: Cli, trained: Path) -> None:
    texts = {cli("generate", trained, "o", "--greedy", "-n", 8, "--seed", seed).out for seed in (1, 2)}
    assert len(texts) == 1
    assert cli("generate", trained, "o", "--temperature", 0, "-n", 8).out in texts


def test_chunked_prefill(cli: Cli, trained: Path) -> None:
    whole = cli("generate", trained, "one two three", "--greedy", "-n", 8).out
    assert cli("generate", trained, "one two three", "--greedy", "-n", 8, "--prefill-chunk", 3).out == whole


def test_without_a_prompt_a_document_begins(cli: Cli, trained: Path) -> None:
    assert "prompt of 1 tokens" in cli("generate", trained, "-n", 3).err


def test_bfloat16(cli: Cli, trained: Path) -> None:
    assert cli("generate", trained, "one", "-n", 3, "--dtype", "bfloat16").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "--top-p", "0"], "top_p"),
        (["x", "--min-p", "2"], "min_p"),
        (["x", "-n", "0"], "max-tokens"),
        (["x", "--file", "y.txt"], "not both"),
        (["--file", "missing.txt"], "missing.txt"),
        (["--file", "."], "directory"),
        (["--file", "latin.txt"], "not UTF-8"),
        (["x", "--device", "nowhere"], "there is no device 'nowhere'"),
        (["x", "--dtype", "float8"], "dtype"),
        (["x", "--prefill-chunk", "0"], "prefill-chunk"),
    ],
    ids=str,
)
def test_wrong_input(
    cli: Cli,
    trained: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("más".encode("latin-1"))
    done = cli("generate", trained, *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_no_model_there(cli: Cli, tmp_path: Path) -> None:
    assert "there is no folder" in cli("generate", tmp_path / "nothing").err
    assert "it has no config.json" in cli("generate", tmp_path).err


def test_a_model_without_tokenizer(cli: Cli, trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer"))
    done = cli("generate", tmp_path / "model", "x")
    assert done.status == 2
    assert "without a tokenizer" in done.err


def test_a_closed_pipe_is_no_mistake(trained: Path) -> None:
    """As in `intarsia generate ... | head -c 1`."""
    command = f"{sys.executable} -m intarsia generate {trained} one -n 400 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "o"
    assert "Traceback" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_a_long_prompt_is(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk, shown in ((3, True), (100, False)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        done = cli("generate", trained, "one two", "-n", 2, "--prefill-chunk", chunk)
        assert done.status == 0
        assert done.out.startswith("one two")
        assert ("3 of 8 tokens" in terminal.getvalue()) == shown
