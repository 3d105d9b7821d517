"""Answers keep to schemas and grammars, whatever tokens a model would rather choose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.data.fast_tokenizer import fast_tokenizer
from intarsia.data.tiktoken_tokenizer import TiktokenTokenizer
from intarsia.data.tokenizer_base import Tokenizer
from intarsia.data.world_tokenizer import WorldTokenizer
from intarsia.errors import ConfigError, IntarsiaError, UnsupportedError
from intarsia.inference import Engine, EngineSettings, Grammars, LookUp, Request, Sampling, Structure
from intarsia.inference.requests import Ended, Event, Produced
from intarsia.model import InferenceModel, LanguageModel, presets

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 3},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["name", "age", "more"],
    "additionalProperties": False,
    "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
}
BYTES = {bytes([n]): n for n in range(256)}
WORDS = {word: 256 + n for n, word in enumerate([b'{"', b'":', b"name", b"true", b" red", b"\xc3\xa4"])}


def of_files() -> Tokenizer:
    """One that is a tokenizer.json."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    )
    backend.train_from_iterator([json.dumps({"name": "red", "age": 3}), '{"name": true}'] * 3, trainer)
    return fast_tokenizer(backend, "files")


def of_words() -> Tokenizer:
    """One of whose tokens several are words, and which has special tokens and numbers that no token has."""
    shifted = {content: token + 1 for content, token in (BYTES | WORDS).items()}
    return WorldTokenizer(shifted | {b"green": 280}, {281: "<user>"}, "world")


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "files": of_files,
    "tiktoken": lambda: TiktokenTokenizer(BYTES | WORDS, {262: "[EOS]"}, "[EOS]", "kimi"),
    "world": of_words,
}


def model_for(tokenizer: Tokenizer) -> InferenceModel:
    """With tokens that the tokenizer does not know, as published models have."""
    made = LanguageModel(presets.get("kimi-linear-nano", vocab_size=tokenizer.vocab_size + 41))
    made.init_weights(0)
    return InferenceModel(made.double())


def run(engine: Engine, request: Request) -> tuple[dict[int, list[int]], dict[int, Ended]]:
    engine.submit(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    ended = {event.number: event for event in events if isinstance(event, Ended)}
    tokens = {
        n: [event.token for event in events if isinstance(event, Produced) and event.number == n]
        for n in ended
    }
    return tokens, ended


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_answers_keep_to_a_schema_also_where_tokens_are_guessed(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    model, ends = model_for(tokenizer), frozenset([tokenizer.separator])
    grammars = Grammars(tokenizer, model.config.vocab_size, ends)
    request = Request(
        tuple(tokenizer.encode('{"name": "red", "age": 3}')), 600, Sampling(temperature=1.5), stop=ends, count=2,
        constraint=grammars.constraint(Structure.of_schema(SCHEMA)),
    )  # fmt: skip
    tokens, ended = run(Engine(model, EngineSettings(tokens=4000, drafts=0)), request)
    assert {each.reason for each in ended.values()} == {"stop"}
    for answer in tokens.values():
        found = json.loads(tokenizer.decode(answer))
        jsonschema_rs.validate(SCHEMA, found)
    assert tokens[0] != tokens[1]
    engine = Engine(model, EngineSettings(tokens=4000), LookUp(2, 1))
    assert run(engine, request)[0] == tokens
    assert engine.report().guessed > 0


@pytest.mark.parametrize(
    ("structure", "matches"),
    [
        (Structure("regex", "[ab]{3}c"), r"[ab]{3}c"),
        (Structure("lark", 'start: verb " " /[0-9]+/\nverb: "go" | "stop"'), r"(go|stop) [0-9]+"),
        (Structure.of_schema({"enum": ["yes", "no"]}), '"(yes|no)"'),
        (Structure.of_schema({"type": "array", "items": {"type": "null"}, "maxItems": 2}), r"\[[\s,nul]*\]"),
    ],
)
def test_other_structures(structure: Structure, matches: str) -> None:
    tokenizer = ByteTokenizer()
    model = model_for(tokenizer)
    constraint = Grammars(tokenizer, model.config.vocab_size, [256]).constraint(structure)
    request = Request((1, 2, 3), 300, stop=frozenset([256]), count=3, constraint=constraint)
    tokens, ended = run(Engine(model, EngineSettings(tokens=4000), LookUp()), request)
    for n, answer in tokens.items():
        found = tokenizer.decode(answer)
        assert ended[n].reason == "stop" or len(answer) == 300
        assert ended[n].reason == "length" or re.fullmatch(matches, found)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure.of_schema({"type": "wrong"}), "JSON schema cannot be used: Invalid type: wrong"),
        (Structure.of_schema({"not": {}}), "Unimplemented keys"),
        (Structure.of_schema({"$ref": "#/$defs/no"}), "does not exist"),
        (Structure.of_schema({"$ref": "https://example.org/x"}), "does not fetch"),
        (Structure.of_schema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable"),
        (Structure.of_schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (Structure("json", "{"), "JSON schema cannot be read"),
        (Structure("lark", "start: missing"), 'unknown name: "missing"'),
        (Structure("lark", ""), "Empty grammar"),
        (Structure("regex", "(a"), "unclosed group"),
        (Structure("xml", "<a/>"), "json, lark or regex"),
    ],
)
def test_what_cannot_be_kept_to_is_said(structure: Structure, message: str) -> None:
    grammars = Grammars(ByteTokenizer(), 257, [256])
    with pytest.raises(ConfigError, match=re.escape(message)):
        grammars.constraint(structure)


def test_a_text_whose_constraint_fails_leaves_the_others_alone() -> None:
    class Fails:
        def allowed(self) -> torch.Tensor:
            raise IntarsiaError("too large here")

        def accept(self, token: int) -> None:
            raise AssertionError

    model = model_for(ByteTokenizer())
    engine = Engine(model, EngineSettings(tokens=4000))
    alone, _ = run(engine, Request((5, 6), 8, seed=3))
    engine.submit(Request((5, 6), 8, constraint=Fails))
    tokens, ended = run(engine, Request((5, 6), 8, seed=3))
    assert tokens[0] == alone[0]
    assert str(ended[0].error) == "None" or "too large here" in str(ended[0].error)


def test_tokens_that_break_it_are_told_and_not_counted() -> None:
    constraint = Grammars(ByteTokenizer(), 257, [256]).constraint(Structure("regex", "ab"))()
    assert constraint.allowed().nonzero().flatten().tolist() == [ord("a")]
    constraint.accept(ord("x"))
    with pytest.raises(IntarsiaError, match="cannot be kept to"):
        constraint.allowed()


def test_tokenizers_and_ends_that_cannot_be() -> None:
    class Other(ByteTokenizer.__base__.__base__):  # type: ignore[name-defined, misc]
        name, vocab_size, separator = "other", 3, 2

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

        encode = decode = decode_stream = save = fingerprint = None

    with pytest.raises(UnsupportedError, match=r"'other' has no tokenizer\.json"):
        Grammars(Other(), 3, [2])
    with pytest.raises(ConfigError, match="must be ended by a token"):
        Grammars(ByteTokenizer(), 257, [])
