"""Chat templates: the text is transformers' own, and nothing in a template reaches out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import intarsia
from intarsia.data.chat import ChatTemplate, chat_template_of, parse_options
from intarsia.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")

SOURCE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] | trim + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " a b "},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c </s> d"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with its template in the configuration, as older models have it."""
    words = ["a", "b", "c", "d", "?", "be", "brief", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[7:])
    backend.save(str(tmp_path / "tokenizer.json"))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": SOURCE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    return tmp_path


@pytest.mark.parametrize("answer", [True, False])
def test_as_transformers_applies_it(folder: Path, answer: bool) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    template = chat_template_of(folder)
    assert template is not None
    text = template.render(MESSAGES, answer)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer)
    ids = intarsia.load_tokenizer(folder).encode_chat(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ids[:4] == [7, 9, 5, 6]


def test_where_templates_are(folder: Path) -> None:
    assert chat_template_of(folder) == ChatTemplate(SOURCE, {"bos_token": "<s>", "eos_token": "</s>"})
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text())
    options["chat_template"] = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    file.write_text(json.dumps(options))
    assert (found := chat_template_of(folder)) is not None
    assert found.source == "d"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "older"}))
    assert (found := chat_template_of(folder)) is not None
    assert found.source == "older"
    (folder / "chat_template.jinja").write_text("newer")
    assert (found := chat_template_of(folder)) is not None
    assert found.source == "newer"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(DataError, match="chat_template must be a text"):
        chat_template_of(folder)
    for name in ("chat_template.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert chat_template_of(folder) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('no system message here') }}", "no system message here"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% include '/etc/hostname' %}", "no loader|cannot be used"),
    ],
)
def test_what_a_template_must_not(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source).render(MESSAGES)


THINKING = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{{ language }}"
)


def test_options_are_what_transformers_passes_on(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    written = ["enable_thinking=false", f"tools={json.dumps([tool])}", "language=en-GB"]
    options = parse_options(written)
    assert options == {"enable_thinking": False, "tools": [tool], "language": "en-GB"}
    text = ChatTemplate(THINKING).with_options(options).render(MESSAGES)
    assert text == theirs.apply_chat_template(MESSAGES, chat_template=THINKING, tokenize=False, **options)
    assert text == "[add]be brief  a b  b c </s> d en-GB"
    assert ChatTemplate(THINKING).render(MESSAGES).endswith("<think>")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("enable_thinkin=false", "never asks for 'enable_thinkin'"),
        ("messages=[]", "'messages' is no option of a chat template"),
        ("enable_thinking", "NAME=VALUE, as in enable_thinking=false; got 'enable_thinking'"),
        ("=false", "NAME=VALUE"),
    ],
)
def test_options_that_would_change_nothing_are_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(THINKING).with_options(parse_options([option]))
