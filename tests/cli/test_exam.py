"""`intarsia exam`: a trained model on tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intarsia.checkpoints.native import load_model, save_model
from intarsia.tasks import MQAR, Palindrome, examine

Cli = Callable[..., Any]


def test_as_json(cli: Cli, trained: Path) -> None:
    done = cli(
        "exam", trained, "--tasks", "mqar:length=16,pairs=4 palindrome:length=9", "--examples", 20, "--json"
    )
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert [(exam["task"], exam["options"]) for exam in found["exams"]] == [
        ("mqar", {"length": 16, "pairs": 4, "values": 64}),
        ("palindrome", {"length": 9, "symbols": 64}),
    ]
    model = load_model(trained / "model")
    for exam, task in zip(found["exams"], (MQAR(16, pairs=4), Palindrome(9)), strict=True):
        answers = examine(model, task, examples=20)
        assert exam["answers"]["right"] == answers.score.right_tokens
        assert exam["answers"]["asked"] == answers.score.tokens
        assert exam["answers"]["interval"] == list(answers.token_interval())
        assert exam["sequences"]["asked"] == 20


def test_for_people(cli: Cli, trained: Path) -> None:
    done = cli("exam", trained, "--tasks", "mqar:length=16", "--tasks", "palindrome:length=9", "--show", 1)
    assert done.status == 0, done.err
    assert "mqar:length=16 " in done.out
    assert "% of 1,792" in done.out, "seven answers of 256 examples"
    for line in ("mqar 0", "reads  k", "asked  .", "says   .", "palindrome 0"):
        assert line in done.out


def test_dials_are_examined_one_by_one_and_kept(cli: Cli, trained: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.json"
    given = ("exam", trained, "--out", sheet, "--examples", 20, "--tasks")
    assert cli(*given, "chains:length=24,hops=2,distance=0|2").status == 0
    kept = json.loads(sheet.read_text())["exams"]
    done = cli(*given, "chains:length=24,hops=1|2,distance=0|2")
    assert done.status == 0, done.err
    assert f"2 of 4 were in {sheet}" in done.err
    assert "chains: right answers in %" in done.out
    assert r"hops \ distance" in done.out
    assert "chains:length=24,hops=2,distance=0 " in done.out, (
        "what varies is said, also where it is as by default"
    )
    found = json.loads(sheet.read_text())["exams"]
    assert found[:2] == kept
    assert sorted((e["options"]["hops"], e["options"]["distance"]) for e in found) == [
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 2),
    ]
    again = json.loads(cli(*given, "chains:length=24,hops=1|2,distance=0|2", "--json").out)["exams"]
    assert sorted(map(str, again)) == sorted(map(str, found))
    # The whole examination of a model that has the sheet of another is refused, and the sheet stays.
    other = load_model(trained / "model")
    save_model(tmp_path / "other", other)
    refused = cli("exam", tmp_path / "other", "--out", sheet, "--tasks", "parity:length=9")
    assert refused.status == 2
    assert "has the exam of another model" in refused.err
    assert json.loads(sheet.read_text())["exams"] == found


def test_an_interrupted_exam_keeps_what_it_has(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import intarsia.tasks

    sheet = tmp_path / "sheet.json"
    seen = []

    def stops(model: Any, task: Any, **options: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(task)
        return examine(model, task, **options)

    given = ("exam", trained, "--out", sheet, "--examples", 5, "--tasks", "parity:length=8|9|10")
    with monkeypatch.context() as patch:
        patch.setattr(intarsia.tasks, "examine", stops)
        assert cli(*given).status != 0
    assert [e["options"]["length"] for e in json.loads(sheet.read_text())["exams"]] == [8]
    assert cli(*given).status == 0
    assert [e["options"]["length"] for e in json.loads(sheet.read_text())["exams"]] == [8, 9, 10]


def test_a_model_that_learned_a_task_is_examined_on_it(cli: Cli, trained: Path, tmp_path: Path) -> None:
    learned = {"task": "palindrome", "options": {"length": 9, "symbols": 5}, "seed": 3}
    model = load_model(trained / "model")
    save_model(tmp_path / "model", model, extra={"exam": learned})
    found = json.loads(cli("exam", tmp_path / "model", "--json").out)
    assert (found["seed"], found["exams"][0]["task"]) == (3, "palindrome")
    answers = examine(model, Palindrome(9, symbols=5), seed=3)
    assert found["exams"][0]["answers"]["right"] == answers.score.right_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"did not learn a task: say what to examine it on, for instance --tasks mqar:length=64"),
        (
            ["--tasks", "mqr:length=16"],
            "--tasks mqr:length=16: task: there is no task 'mqr'; did you mean 'mqar'",
        ),
        (["--tasks", "mqar"], "options.length is missing; write mqar:length=… (and"),
        (["--tasks", "mqar:lengt=16"], "options.lengt: unknown option; did you mean 'length'"),
        (["--tasks", "mqar:length"], "--tasks takes NAME:option=value,option=value"),
        (["--tasks", "mqar:length=many"], "options.length must be a whole number; got 'many'"),
        (["--tasks", "mqar:length=512"], "has 321 different tokens and the model 257"),
        (["--tasks", "mqar:length=16", "--split", "tset"], "split must be one of train, validation, test"),
        (["--tasks", "mqar:length=16", "--device", "tpu9"], "there is no device 'tpu9' here"),
    ],
)
def test_wrong_input(cli: Cli, trained: Path, options: list[str], message: str) -> None:
    done = cli("exam", trained, *options)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_no_model(cli: Cli, tmp_path: Path) -> None:
    done = cli("exam", tmp_path, "--tasks", "mqar:length=16")
    assert done.status == 2
    assert "no model in" in done.err
