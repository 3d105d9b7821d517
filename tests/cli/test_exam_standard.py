"""`intarsia exam` with tasks of lm-eval-harness: what they count is what the model itself says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.checkpoints.native import load_model
from intarsia.data.published import load_tokenizer
from intarsia.errors import ConfigError
from intarsia.inference import generate
from intarsia.inference.harness import StandardTask
from intarsia.tasks.exam import wilson

Cli = Callable[..., Any]

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `ecosystem` is missing")
WORDS = ["one", "two", "three", "más"]
QUESTIONS = [
    {"text": " ".join(WORDS[(n * k) % 4] for k in range(1 + n % 5)), "answer": n % 4} for n in range(12)
]
CHOICE = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
doc_to_choice: ["one", "two", "three", "más"]
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: said
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
READ = """
task: reading
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def write(place: Path, task: str, questions: list[dict[str, Any]]) -> Path:
    """The YAML file of a task with these questions."""
    data = place / "data.jsonl"
    data.write_text("\n".join(json.dumps(each) for each in questions), encoding="utf-8")
    (place / "task.yaml").write_text(task.format(data=data), encoding="utf-8")
    return place / "task.yaml"


def likelihood(model: Any, tokenizer: Any, before: str, text: str) -> float:
    """Of a text behind another, from the beginning of a document, in the model's float32 and summed in float64."""
    context = [tokenizer.separator, *tokenizer.encode(before)]
    whole = [tokenizer.separator, *tokenizer.encode(before + text)]
    with torch.no_grad():
        scores = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    return sum(scores[place - 1, whole[place]].item() for place in range(len(context), len(whole)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_eval:", "the name is missing"),
        ("lm_eval:words,shots=3", r"takes lm_eval:NAME,fewshot=NUMBER,limit=NUMBER .* got 'lm_eval:words,shots=3'"),
        ("lm_eval:words,limit=-1", "takes lm_eval:NAME"),
        ("lm_eval:words,limit=0", "a limit is at least 1"),
    ],
)  # fmt: skip
def test_what_is_not_of_that_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StandardTask.read(text)
    assert StandardTask.read("lm_eval:words,limit=2,fewshot=0") == StandardTask("words", 0, 2)


def test_without_the_harness_the_extra_is_named(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = cli("exam", trained, "--tasks", "lm_eval:arc_easy")
    assert done.status != 0
    assert "pip install 'intarsia[ecosystem]'" in done.err


@needs_harness
@pytest.mark.slow
def test_choices(cli: Cli, trained: Path, tmp_path: Path) -> None:
    task, sheet = write(tmp_path, CHOICE, QUESTIONS), tmp_path / "sheet.json"
    given = ("exam", trained, "--tasks", f"lm_eval:{task},limit=10 palindrome:length=9", "--out", sheet)
    done = cli(*given, "--json")
    assert done.status == 0, done.err
    own, entry = json.loads(done.out)["exams"]
    assert own["task"] == "palindrome"
    assert (entry["task"], entry["options"], entry["examples"]) == (f"lm_eval:{task}", {"limit": 10}, 10)
    result = entry["results"]["words"]
    assert (result["questions"], result["fewshot"]) == (10, 0)
    model, tokenizer = load_model(trained / "model"), load_tokenizer(trained / "model")
    right = 0
    for question in QUESTIONS[:10]:
        scores = [likelihood(model, tokenizer, question["text"], f" {word}") for word in WORDS]
        right += scores.index(max(scores)) == question["answer"]
    assert result["metrics"]["acc,none"]["value"] == pytest.approx(right / 10)
    assert result["metrics"]["acc,none"]["interval"] == pytest.approx(list(wilson(right / 10, 10)))
    assert json.loads(sheet.read_text())["exams"] == [own, entry]
    task.unlink()  # what is there is not asked again
    shown = cli(*given)
    assert shown.status == 0, shown.err
    assert "2 of 2 were in" in shown.err
    assert f"lm_eval:{result and 'words'}" in shown.out
    assert "acc" in shown.out


@needs_harness
@pytest.mark.slow
def test_answers_and_texts(cli: Cli, trained: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(trained / "model"), load_tokenizer(trained / "model")
    questions = []
    for n, question in enumerate(QUESTIONS[:6]):
        prompt = [tokenizer.separator, *tokenizer.encode(question["text"])]
        tokens = [*generate(model, prompt, max_tokens=9, stop={tokenizer.separator}, **greedy())]
        said = tokenizer.decode(tokens).split(" ")[0]
        questions.append({"text": question["text"], "said": said if n % 2 else said + "!"})
    asked = write(tmp_path, WRITTEN, questions)
    done = cli("exam", trained, "--tasks", f"lm_eval:{asked}", "--json")
    assert done.status == 0, done.err
    metrics = json.loads(done.out)["exams"][0]["results"]["said"]["metrics"]
    assert metrics["exact_match,none"]["value"] == 0.5

    read = write(tmp_path, READ, QUESTIONS[:3])
    done = cli("exam", trained, "--tasks", f"lm_eval:{read}", "--json")
    assert done.status == 0, done.err
    bits = json.loads(done.out)["exams"][0]["results"]["reading"]["metrics"]["bits_per_byte,none"]
    texts = [question["text"] for question in QUESTIONS[:3]]
    nats = sum(likelihood(model, tokenizer, "", text) for text in texts)
    in_bytes = sum(len(text.encode()) for text in texts)
    assert bits["value"] == pytest.approx(-nats / in_bytes / torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    assert bits["interval"] is None, "which is no mean over texts"


def greedy() -> dict[str, Any]:
    from intarsia.inference import Sampling

    return {"sampling": Sampling(greedy=True)}


@needs_harness
@pytest.mark.slow
def test_what_cannot_be_asked(cli: Cli, trained: Path, tmp_path: Path) -> None:
    for task, message in (
        ("lm_eval:arc_eazy", "lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'"),
        (f"lm_eval:{tmp_path / 'none.yaml'}", "cannot be read"),
        (f"lm_eval:{write(tmp_path, CHOICE, [])}", "cannot be had"),
    ):
        (tmp_path / "data.jsonl").unlink(missing_ok=True)
        done = cli("exam", trained, "--tasks", task, "--out", tmp_path / "sheet.json")
        assert done.status == 2, task
        assert message in " ".join(done.err.split())
        assert not (tmp_path / "sheet.json").exists()
