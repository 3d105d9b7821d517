"""`intarsia chat`: turns, the state between them, and how one leaves."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import intarsia
from intarsia.data.chat import ChatTemplate, chat_template_of
from intarsia.errors import ConfigError
from intarsia.inference import GREEDY
from intarsia.inference.conversation import Conversation
from intarsia.model import InferenceModel
from support.checkpoint_cases import CASES, their_folder

Cli = Callable[..., Any]
pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# As Qwen's: what an earlier answer thought is taken out, and each answer begins to think.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'].split(' ')[0] if m['role'] == 'assistant' else "
    "m['content'] }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> think {% endif %}"
)
WORDS = ["?", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "one", "two", "three", "think"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi Linear with a tokenizer of words and a chat template. Not to be written to."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    case = next(case for case in CASES if case.family == "kimi_linear")
    folder = their_folder(case, tmp_path_factory.mktemp("chat"))
    words = {word: n for n, word in enumerate([*WORDS, *(f"w{n}" for n in range(61 - len(WORDS)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[1:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": False}))
    return folder


class Counted:
    """Counts the tokens that go into the model, and remembers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[int]] = []
        self.before: Callable[[int], None] = lambda call: None
        run = InferenceModel.__call__

        def counted(model: InferenceModel, tokens: Any, *args: Any, **options: Any) -> Any:
            self.before(len(self.calls))
            self.calls.append(tokens[0].tolist())
            return run(model, tokens, *args, **options)

        monkeypatch.setattr(InferenceModel, "__call__", counted)

    def taken(self) -> list[int]:
        """All tokens since the last time."""
        tokens = [token for call in self.calls for token in call]
        self.calls.clear()
        return tokens


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def conversation(folder: Path, source: str | None = None, **options: Any) -> Conversation:
    model, tokenizer = InferenceModel(intarsia.load(folder)), intarsia.load_tokenizer(folder)
    template = chat_template_of(folder) if source is None else ChatTemplate(source)
    options = {"stop": {1}, "sampling": GREEDY, "max_tokens": 5, **options}
    return Conversation(model, tokenizer, template, **options)


def test_a_turn_reads_what_is_new(folder: Path, counted: Counted) -> None:
    """The second turn reads the end of the first answer, and the message."""
    talk = conversation(folder, system="three")
    first = "".join(talk.say("one two"))
    tokenizer = intarsia.load_tokenizer(folder)
    tokens = counted.taken()
    prompt = tokenizer.encode_chat("<|system|> three <|end|> <|user|> one two <|end|> <|assistant|>")
    assert tokens[: len(prompt)] == prompt
    assert talk.last is not None
    assert (talk.last.kept, talk.last.read) == (0, len(prompt))
    answered = tokens[len(prompt) :]
    assert len(answered) == talk.last.written - (talk.last.ended == "length")

    second = "".join(talk.say("two"))
    again = counted.taken()
    new = tokenizer.encode_chat("<|end|> <|user|> two <|end|> <|assistant|>")
    pending = tokenizer.encode(first)[len(answered) :]  # the last token of an answer is chosen and not read
    assert again[: len(pending) + len(new)] == [*pending, *new]
    assert (talk.last.kept, talk.last.read) == (len(tokens), len(pending) + len(new))
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]

    # All of it at once gives the same answer.
    fresh = conversation(folder, system="three")
    fresh.messages = talk.messages[:3]
    assert "".join(fresh.say("two")) == second
    assert fresh.last is not None
    assert (fresh.last.kept, fresh.last.read) == (0, len(tokens) + len(pending) + len(new))


def test_a_template_that_forgets_thoughts(folder: Path, counted: Counted) -> None:
    """The answer is read as it is now, behind the message before it; that is not read again."""
    talk = conversation(folder, FORGETFUL)
    tokenizer = intarsia.load_tokenizer(folder)
    answer = "".join(talk.say("one two three"))
    asked = tokenizer.encode_chat("<|user|> one two three <|end|>")
    assert counted.taken()[: len(asked) + 2] == [*asked, *tokenizer.encode_chat("<|assistant|> think")]
    assert len(answer.split()) > 1
    second = "".join(talk.say("two"))
    new = tokenizer.encode_chat(
        f"<|assistant|> {answer.split(' ')[0]} <|end|> <|user|> two <|end|> <|assistant|> think"
    )
    assert counted.taken()[: len(new)] == new
    assert talk.last is not None
    assert (talk.last.kept, talk.last.read) == (len(asked), len(new))
    fresh = conversation(folder, FORGETFUL)
    fresh.messages = talk.messages[:2]
    assert "".join(fresh.say("two")) == second


def test_reading_in_pieces_changes_nothing(folder: Path) -> None:
    whole, pieces = conversation(folder), conversation(folder, prefill_chunk=2)
    for message in ("one two three one two", "three"):
        assert "".join(whole.say(message)) == "".join(pieces.say(message))


def test_an_interrupted_prompt_has_not_been(folder: Path, counted: Counted) -> None:
    talk = conversation(folder, prefill_chunk=2)
    assert list(talk.say("one two three", lambda: len(counted.calls) == 2)) == []
    assert talk.messages == []
    assert talk.last is not None
    assert talk.last.ended == "interrupted"
    counted.taken()
    there = "".join(talk.say("two"))
    assert there == "".join(conversation(folder).say("two"))


def test_plain_text_goes_on(folder: Path, counted: Counted) -> None:
    model, tokenizer = InferenceModel(intarsia.load(folder)), intarsia.load_tokenizer(folder)
    talk = Conversation(model, tokenizer, None, begin=(1,), sampling=GREEDY, max_tokens=2)
    answer = "".join(talk.say("one"))
    assert counted.taken()[:2] == [1, 5]
    "".join(talk.say("two"))
    assert counted.taken()[:2] == [tokenizer.encode(answer)[-1], 6]
    with pytest.raises(ConfigError, match="this model has none"):
        Conversation(model, tokenizer, None, system="three")


def talk_to(cli: Cli, monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: object) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli("chat", *arguments)


def test_the_command(cli: Cli, folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["one", "", "/help", "two", "/reset", "one", "/exit", "never"]
    done = talk_to(cli, monkeypatch, said, folder, "-n", 3, "-s", "three")
    assert done.status == 0, done.err
    answers = done.out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]  # forgotten, and greedy as the model's files say
    assert "[7 tokens read in" in done.err
    assert "[6 tokens read in" in done.err
    assert "9 kept" in done.err
    assert "/reset  forget all that was said" in done.err
    assert len(counted.taken()) == (7 + 2) + (1 + 5 + 2) + (7 + 2)
    assert talk_to(cli, monkeypatch, [], folder).status == 0  # as Ctrl-D
    assert talk_to(cli, monkeypatch, ["one"], folder, "-t", -1).status == 2


def test_ctrl_c_stops_an_answer(
    cli: Cli, folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session goes on, behind what was said."""
    counted.before = lambda call: signal.raise_signal(signal.SIGINT) if call == 3 else None
    done = talk_to(cli, monkeypatch, ["one", "two"], folder, "-n", 9)
    assert done.status == 0, done.err
    first, second = done.out.splitlines()
    assert len(first.split()) == 2
    assert len(second.split()) == 9
    assert "2 written" in done.err
    assert "interrupted]" in done.err
    # The message and the beginning of its answer, in pieces; the steps; and the next turn, behind all of these.
    assert [len(call) for call in counted.calls[:6]] == [3, 1, 1, 1, 4, 1]


def test_without_a_template(cli: Cli, trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = talk_to(cli, monkeypatch, ["one"], trained, "-n", 5)
    assert done.status == 0, done.err
    assert "has no chat template" in done.err
    assert "Plain mode" in done.err
    done = talk_to(cli, monkeypatch, ["one"], trained, "--system", "two")
    assert done.status == 2
    assert "an instruction stands where a chat template puts it" in done.err
    done = talk_to(cli, monkeypatch, ["one"], folder, "-n", 2, "--plain")
    assert (done.status, "Plain mode" in done.err) == (0, False)


def test_a_message_that_the_template_does_not_take(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['content'] == 'two' %}{{ raise_exception('not two') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    done = talk_to(cli, monkeypatch, ["one", "two", "three"], tmp_path / "strict", "-n", 2)
    assert done.status == 0, done.err
    assert "the chat template cannot be used: not two" in done.err
    assert len(done.out.splitlines()) == 2


def test_a_converted_model_keeps_its_manners(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("convert", folder, tmp_path / "ours", "--to", "intarsia").status == 0
    there = talk_to(cli, monkeypatch, ["one", "two"], folder, "-n", 4)
    here = talk_to(cli, monkeypatch, ["one", "two"], tmp_path / "ours", "-n", 4)
    assert there.status == here.status == 0
    assert here.out == there.out
    assert "Plain mode" not in here.err


def changed(folder: Path, tmp_path: Path, template: str) -> Path:
    import shutil

    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "chat_template.jinja").write_text(template)
    return tmp_path / "changed"


def test_options_of_the_template(
    cli: Cli, folder: Path, tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = changed(folder, tmp_path, TEMPLATE + "{% if enable_thinking %}think{% endif %}")
    assert talk_to(cli, monkeypatch, ["one"], place, "-n", 1).status == 0
    without = counted.taken()
    assert talk_to(cli, monkeypatch, ["one"], place, "-n", 1, "-o", "enable_thinking=true").status == 0
    assert counted.taken() == [*without, WORDS.index("think")]
    counted.before = lambda call: pytest.fail("a model was run")
    for arguments, said in [
        (("-o", "thinking=true"), "never asks for 'thinking'"),
        (("-o", "enable_thinking=true", "--plain"), "--plain leaves it out"),
    ]:
        done = talk_to(cli, monkeypatch, ["one"], place, *arguments)
        assert (done.status, said in done.err) == (2, True), done.err


def test_a_damaged_template_is_told_before_a_model_is_read(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = changed(folder, tmp_path, "{% for m in messages %}")
    (place / "model.safetensors").unlink()
    done = talk_to(cli, monkeypatch, ["one"], place)
    assert done.status == 2
    assert "the chat template cannot be used: Unexpected end of template" in done.err
