"""The verbs that list and measure: tables for people, pure JSON for programs, clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intarsia.mixers import names as mixer_names
from intarsia.model import presets

TALK = ["chat", "serve"]
"""Those that print no result, and so no JSON."""
VERBS = [*TALK, "train", "generate", "compare", "ladder", "exam", "inspect", "convert", "presets", "mixers"]
Cli = Callable[..., Any]


def test_without_arguments_the_help_is_shown(cli: Cli) -> None:
    done = cli()
    assert "Usage: intarsia" in done.out + done.err
    assert all(verb in done.out + done.err for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_examples(cli: Cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert done.status == 0
    assert done.out.count(f"intarsia {verb}") >= 2
    assert ("--json" in done.out) == (verb not in TALK)


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.status, done.out.split()[0]) == (0, "intarsia")


def test_a_mistyped_verb_is_an_error(cli: Cli) -> None:
    done = cli("trian")
    assert done.status == 2
    assert "trian" in done.err


def test_presets_names_all(cli: Cli) -> None:
    done = cli("presets")
    assert done.status == 0
    assert all(name in done.out for name in presets.names())
    rows = json.loads(cli("presets", "--json").out)
    assert [row["name"] for row in rows] == presets.names()


def test_presets_with_another_vocabulary(cli: Cli) -> None:
    rows = json.loads(cli("presets", "--json", "--vocab-size", 333).out)
    assert {row["vocab_size"] for row in rows} == {333}


@pytest.mark.parametrize("columns", [80, 120, 220])
def test_mixers_names_all_with_equations(cli: Cli, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("mixers")
    assert done.status == 0
    words = done.out.split()
    rows = json.loads(cli("mixers", "--json").out)
    assert [row["name"] for row in rows] == mixer_names()
    for row in rows:
        assert row["name"] in words
        # In narrow terminals a rule goes over several lines.
        assert row["equation"] in done.out or (columns < 220 and row["equation"].split()[0] in words)
    linear = next(row for row in rows if row["name"] == "kda")
    at_1k, at_1m = linear["cost"]["lengths"]
    assert (at_1k["length"], at_1m["length"]) == (1024, 1024 * 1024)
    assert at_1k["state_bytes"] == at_1m["state_bytes"]
    assert linear["implementations"][-2:] == ["chunked", "reference"]


def test_one_mixer_in_full(cli: Cli) -> None:
    done = cli("mixers", "kda")
    assert "num_heads (required)" in done.out
    assert json.loads(cli("mixers", "kda", "--json").out)["required_options"] == ["num_heads", "head_dim"]


def test_unknown_mixer(cli: Cli) -> None:
    done = cli("mixers", "kdaa")
    assert (done.status, done.out) == (2, "")
    assert "'kda'" in done.err
    assert "Traceback" not in done.err


def test_inspect_the_largest_preset(cli: Cli) -> None:
    done = cli("inspect", "kimi-linear-48b-a3b")
    assert done.status == 0
    assert "49.12 B" in done.out
    facts = json.loads(cli("inspect", "kimi-linear-48b-a3b", "--json").out)
    assert round(facts["parameters"] / 1e9, 2) == 49.12
    assert len(facts["layers"]) == facts["depth"] == 27


def test_inspect_at_lengths_and_batch(cli: Cli) -> None:
    facts = json.loads(cli("inspect", "full-tiny", "--json", "-n", "1k", "-n", "2k", "--batch", 3).out)
    first, second = facts["lengths"]
    assert (first["length"], second["length"]) == (1000, 2000)
    assert second["state_bytes"] == 2 * first["state_bytes"]
    alone = json.loads(cli("inspect", "full-tiny", "--json", "-n", "1k").out)["lengths"][0]
    assert first["state_bytes"] == 3 * alone["state_bytes"]


def test_inspect_a_run_and_its_model(cli: Cli, trained: Path) -> None:
    run = json.loads(cli("inspect", trained, "--json").out)
    model = json.loads(cli("inspect", trained / "model", "--json").out)
    assert run["config"] == model["config"]
    assert run["d_model"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kimi-tiny"], "did you mean 'kimi-linear-tiny'"),
        (["no/such/place"], "there is no directory no/such/place"),
        (["."], "no model in"),
        (["full-tiny", "-n", "many"], "such as 5000, 64k"),
        (["full-tiny", "-n", "0"], "positive"),
        (["full-tiny", "-n", "inf"], "positive"),
        (["full-tiny", "--batch", "0"], "batch"),
        (["full-tiny", "--vocab-size", "-1"], "vocab-size"),
        ([], "Missing argument"),
    ],
    ids=str,
)
def test_inspect_wrong_input(
    cli: Cli, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("inspect", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_inspect_a_damaged_directory(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    done = cli("inspect", tmp_path)
    assert done.status == 2
    assert "config.json" in done.err


def test_vocabulary_of_a_trained_model_is_fixed(cli: Cli, trained: Path) -> None:
    done = cli("inspect", trained, "--vocab-size", 100)
    assert done.status == 2
    assert "presets" in done.err


def test_a_mistake_can_keep_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from intarsia.errors import ConfigError

    monkeypatch.setenv("INTARSIA_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli("inspect", "kimi-tiny")
