"""Chat templates: how a dialogue becomes the text that a published model has learned to answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from intarsia.checkpoints.native import TOKENIZER
from intarsia.checkpoints.places import find_folder
from intarsia.data.beside import read_object
from intarsia.data.tiktoken_tokenizer import CONFIGURATION_FILE, spelling
from intarsia.errors import ConfigError, DataError
from intarsia.extras import require

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
ARGUMENTS = frozenset({
    "messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
    "return_assistant_tokens_mask",
})  # fmt: skip
"""What a template is called with and is no option of it."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, run in the sandbox of transformers: it sees the messages and the special tokens, cannot
    change them, and reaches neither files nor Python's objects.

    Attributes:
        source: its text.
        tokens: the spellings that it may name, such as `eos_token`.
        options: what else it may ask for, such as `enable_thinking`.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> str:
        """The text of a dialogue, for `Tokenizer.encode_chat`.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, in their order.
            answer: let it end where the model's answer begins.

        Raises:
            DataError: the template is damaged, refuses the messages, or does what the sandbox does not allow.
            MissingExtraError: transformers is not installed.
        """
        templates = require("transformers.utils.chat_template_utils", "hf")
        jinja = require("jinja2", "hf")
        try:
            rendered, _ = templates.render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=answer,
                **{**self.tokens, **self.options},
            )
        except (jinja.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template cannot be used: {error}") from error
        text: str = rendered[0]
        return text

    def with_options(self, options: Mapping[str, Any]) -> ChatTemplate:
        """The same with what else it may ask for.

        Raises:
            ConfigError: it never asks for one of that name, or no option can have it.
        """
        for name in options:
            if name in ARGUMENTS or name in NAMED_TOKENS:
                raise ConfigError(
                    f"{name!r} is no option of a chat template: the dialogue and the model's files say it"
                )
            if not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise ConfigError(
                    f"the chat template never asks for {name!r}, which would change nothing: its text says what it "
                    "takes"
                )
        return replace(self, options={**self.options, **options})


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a template as they are written on a command line, `NAME=VALUE`: a value in JSON, or else a text.

    Raises:
        ConfigError: one is not of that form.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"an option of a chat template is NAME=VALUE, as in enable_thinking=false; got {text!r}"
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def chat_template_of(path_or_repo: str | Path) -> ChatTemplate | None:
    """The chat template beside a model: a file of its own, or in `tokenizer_config.json`. None if there is none.

    Raises:
        CheckpointError: there is no such folder.
        DataError: a file is damaged.
    """
    folder = find_folder(path_or_repo)
    for place in (folder, folder / TOKENIZER):
        configuration = read_object(place / CONFIGURATION_FILE)
        source = _source(place, configuration)
        if source is not None:
            named = {name: spelling(configuration.get(name)) for name in NAMED_TOKENS}
            return ChatTemplate(source, {name: text for name, text in named.items() if text is not None})
    return None


def _source(place: Path, configuration: Mapping[str, Any]) -> str | None:
    file, older = (place / name for name in TEMPLATE_FILES)
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    found = read_object(older).get("chat_template", configuration.get("chat_template"))
    if isinstance(found, list):  # several with names, of which the one for plain dialogues is meant
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise DataError(f"{place}: chat_template must be a text, or a list of named ones")
    return found
