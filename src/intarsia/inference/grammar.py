"""Answers that have a structure: of a JSON schema, a grammar or a regular expression. llguidance says which tokens keep
to it; it comes with the extra `serve`, and is imported when it is first used.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intarsia.data.fast_tokenizer import FastTokenizer
from intarsia.data.tokenizer_base import ByteLevelTokenizer
from intarsia.errors import ConfigError, DataError, IntarsiaError, UnsupportedError
from intarsia.extras import require
from intarsia.inference.requests import Constraint

if TYPE_CHECKING:
    from intarsia.data import Tokenizer

SPACE = r"[ \t\r\n]{1,64}"
"""What may stand between the parts of a JSON text. There must be an end to it: a model that has nothing to say goes on
with spaces until it has no tokens left."""


@dataclass(frozen=True)
class Structure:
    """What answers must look like.

    Attributes:
        kind: `json` (a schema as JSON has it), `lark` (a grammar in llguidance's variant of Lark's language), `regex`.
        text: the schema, as a text; the grammar; the expression.
    """

    kind: str
    text: str

    @staticmethod
    def of_schema(schema: Mapping[str, Any] | bool) -> Structure:
        """Texts in JSON that a schema allows."""
        return Structure("json", json.dumps(schema))


ANY_OBJECT = Structure.of_schema({"type": "object"})
"""Any JSON object."""


class Grammars:
    """Makes constraints, for one tokenizer and one model.

    Args:
        stop: tokens that end an answer; a request with such a constraint must name them as its `stop`, and there must
            be one: an answer that is complete can only be ended.
        vocab_size: the model's, which may have tokens that the tokenizer does not know. They are never allowed.

    Raises:
        ConfigError: no token ends an answer.
        UnsupportedError: the bytes of the tokenizer's tokens are not known.
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: Iterable[int]) -> None:
        self._library = require("llguidance", "serve")
        self.vocab_size, ends = vocab_size, sorted(stop)
        if not ends:
            raise ConfigError("an answer of a structure must be ended by a token: name one that stops")
        self._tokens = _library_tokenizer(self._library, tokenizer, ends)

    def constraint(self, structure: Structure) -> Callable[[], Constraint]:
        """What a request takes as its `constraint`. Compiled here: that can take a second, on any thread.

        Raises:
            ConfigError: the structure is wrong or too large, or asks for what cannot be kept to; the message says what.
        """
        matcher = self._library.LLMatcher
        if structure.kind not in _SAID:
            raise ConfigError(f"a structure is of the kind json, lark or regex; got {structure.kind!r}")
        try:
            if structure.kind == "json":
                grammar = matcher.grammar_from_json_schema(
                    structure.text, overrides={"whitespace_pattern": SPACE}
                )
            elif structure.kind == "lark":
                grammar = matcher.grammar_from_lark(structure.text)
            else:
                grammar = matcher.grammar_from_regex(structure.text)
        except ValueError as error:
            raise ConfigError(f"the {_SAID[structure.kind]} cannot be read: {error}") from error
        limits = self._library.LLParserLimits(verbose_errors=False)
        is_wrong, messages = matcher.validate_grammar_with_warnings(grammar, self._tokens, limits=limits)
        if is_wrong:
            raise ConfigError(f"the {_SAID[structure.kind]} cannot be used: {messages[0]}")
        made = matcher(self._tokens, grammar, log_level=0, limits=limits)
        _check(made)
        return functools.partial(_start, made, self.vocab_size)


_SAID = {"json": "JSON schema", "lark": "grammar", "regex": "regular expression"}


class _Matching:
    """How far an answer is in its structure."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """See `Constraint.allowed`.

        Raises:
            IntarsiaError: the structure turns out to be too large here.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: self._vocab_size]
        return torch.nn.functional.pad(found, (0, self._vocab_size - found.numel()))

    def accept(self, token: int) -> None:
        """See `Constraint.accept`. What goes wrong here is told by the next `allowed`."""
        self._matcher.consume_token(token)


def _start(matcher: Any, vocab_size: int) -> Constraint:
    return _Matching(matcher.deep_copy(), vocab_size)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise IntarsiaError(f"the answer's structure cannot be kept to: {matcher.get_error()}")


def _library_tokenizer(library: Any, tokenizer: Tokenizer, ends: list[int]) -> Any:
    if isinstance(tokenizer, FastTokenizer):
        # Also of those whose tokens are no strings of bytes the library knows what they stand for.
        return library.LLTokenizer(tokenizer.backend.to_str(), eos_token=ends)
    if not isinstance(tokenizer, ByteLevelTokenizer):
        raise UnsupportedError(
            f"answers of a structure need a tokenizer whose tokens are known as bytes; {tokenizer.name!r} has no "
            "tokenizer.json"
        )
    content = [_bytes_of(tokenizer, token) for token in range(tokenizer.vocab_size)]
    nothing = [token for token, found in enumerate(content) if not found]
    special = sorted({*tokenizer.special_tokens, *ends, *nothing})
    for token in nothing:
        content[token] = b"<|%d|>" % token
    return library.LLTokenizer(
        library.TokenizerWrapper(_Vocabulary(tokenizer, content, special, ends[0])), eos_token=ends
    )


def _bytes_of(tokenizer: ByteLevelTokenizer, token: int) -> bytes:
    try:
        return tokenizer.decode_bytes([token])
    except DataError:  # a number in the vocabulary that no token has
        return b""


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(
        self, tokenizer: ByteLevelTokenizer, tokens: list[bytes], special: list[int], end: int
    ) -> None:
        self._tokenizer, self.tokens, self.special_token_ids, self.eos_token_id = (
            tokenizer,
            tokens,
            special,
            end,
        )

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
