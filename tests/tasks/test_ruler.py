"""RULER's tasks: a solver that reads the prompt finds the answer; lengths, tokens and errors."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from intarsia.data import open_tokenizer
from intarsia.errors import ConfigError, OptionError
from intarsia.model.loss import IGNORED
from intarsia.tasks import make_task
from intarsia.tasks.registry import make_exam, text_names
from intarsia.tasks.text import BoundTask, TextTask

BYTES = open_tokenizer("bytes")
OF_TEXT = ("single-2", "single-3", "multikey-1", "multivalue", "multiquery")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("texts")
    (place / "text").write_text("\n\n".join(f"line {number} of a text." for number in range(50)))
    asked = [
        {"question": f"How high is tower {n}?", "answers": [{"text": f"{7 * n} metres"}], "paragraph": n}
        for n in range(30)
    ]
    paragraphs = [
        {"context": f"Tower {one['paragraph']} is {one['answers'][0]['text']} high.", "qas": [one]}
        for one in asked
    ]
    (place / "squad").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hops = [
        {
            "question": f"How high is tower {n}?",
            "answer": f"{7 * n} metres",
            "context": [
                ["a", [f"Tower {n} is as high", f" as house {n}."]],
                ["b", [f"House {n} is {7 * n} metres high."]],
            ],
            "supporting_facts": [["a", 0], ["b", 0]],
        }
        for n in range(30)
    ]  # fmt: skip
    (place / "hotpot").write_text(json.dumps(hops))
    return {name: str(place / name) for name in ("text", "squad", "hotpot")}


def exam(name: str, length: int, texts: dict[str, str]) -> BoundTask:
    of = {"ruler-qa-1": "squad", "ruler-qa-2": "hotpot"}.get(name, "text" if name.endswith(OF_TEXT) else "")
    made = make_exam(name, {"length": length, **({"text": texts[of]} if of else {})})
    assert isinstance(made, TextTask)
    return made.bound(BYTES)


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def solve(name: str, prompt: str) -> str:
    """The answer, from the prompt alone."""
    context, _, question = prompt.rpartition("\n")
    if "niah" in name:
        asked = re.split(", | and ", question.removeprefix("The value of ").removesuffix(" is"))
        found = re.findall(r"the value of (\S+) is (\S+)\.$", context, re.M)
        return listed([value for key in asked for of, value in found if of == key])
    if name == "ruler-vt":
        value = re.findall(r"\d+", question)[0]
        names: list[str] = []
        for to, of in re.findall(r"VAR (\w+) = (.+)", context):
            if of == value or of.removeprefix("VAR ") in names:
                names.append(to)
        return listed(names)
    if name == "ruler-cwe":
        return listed(sorted(word for word, _ in Counter(context.split()).most_common(10)))
    if name == "ruler-fwe":
        return listed([word for word, _ in Counter(context.split()).most_common(3)])
    tower = re.findall(r"tower (\d+)", prompt)[-1]
    if name == "ruler-qa-1":
        return re.findall(rf"Tower {tower} is (\d+ metres)", prompt)[0]
    assert f"Tower {tower} is as high" in prompt
    return re.findall(rf"House {tower} is (\d+ metres)", prompt)[0]


def test_there_are_thirteen() -> None:
    assert len(text_names()) == 13


@pytest.mark.parametrize("name", text_names())
def test_a_solver_finds_the_answer(name: str, texts: dict[str, str]) -> None:
    it = exam(name, 4500, texts)
    inputs, targets = it.examples(3, range(5, 9))
    assert inputs.shape == targets.shape == (4, 4500)
    for row, asked in zip(inputs, targets, strict=True):
        places = (asked != IGNORED).nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert torch.equal(asked[places[:-1]], row[places[1:]]), "the answer is read as it goes on"
        prompt, answer = BYTES.decode(row[: places[0] + 1].tolist()), BYTES.decode(asked[places].tolist())
        assert answer == " " + solve(name, prompt)
    # Any example can be made first, and seeds and splits have examples of their own.
    assert torch.equal(it.examples(3, range(7, 8)).inputs[0], inputs[2])
    assert not torch.equal(it.examples(4, range(5, 9)).inputs, inputs)
    assert not torch.equal(it.examples(3, range(5, 9), "test").inputs, inputs)


@pytest.mark.parametrize(
    "name", ["ruler-niah-single-1", "ruler-niah-multikey-2", "ruler-vt", "ruler-niah-single-2"]
)
def test_the_context_fills_the_length(name: str, texts: dict[str, str]) -> None:
    for length in (700, 5000):
        _, targets = exam(name, length, texts).examples(0, 4)
        for asked in targets:
            used = int((asked != IGNORED).nonzero()[-1]) + 1
            assert length - 400 <= used <= length


def test_errors(texts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs at least \d+ tokens of this tokenizer; the length is 50"):
        exam("ruler-vt", 50, texts).examples(0, 1)
    with pytest.raises(OptionError, match="text is missing: ruler-niah-single-2 is made of a text"):
        make_exam("ruler-niah-single-2", {"length": 100})
    with pytest.raises(OptionError, match="cannot be read"):
        make_exam("ruler-niah-single-2", {"length": 100, "text": str(tmp_path / "none")})
    with pytest.raises(OptionError, match="no questions in the form of SQuAD or HotpotQA"):
        make_exam("ruler-qa-1", {"length": 100, "text": texts["text"]})
    with pytest.raises(OptionError, match="often must be more than seldom"):
        make_exam("ruler-cwe", {"length": 100, "often": 3})
    with pytest.raises(OptionError, match="is of text: `intarsia exam` examines"):
        make_task("ruler-vt", {"length": 100})
