"""RWKV's own tokenizer: always the longest token of a vocabulary that the text goes on with, byte by byte."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from intarsia.data.beside import read_object
from intarsia.data.documents import valid_unicode
from intarsia.data.tokenizer_base import METADATA_FILE, SEPARATOR, ByteLevelTokenizer
from intarsia.errors import DataError
from intarsia.files import write_json, write_text

VOCABULARY_FILES = "rwkv_vocab*.txt"
_WRITTEN, _CONFIGURATION_FILE = "rwkv_vocab.txt", "tokenizer_config.json"
_LINE = re.compile(r"(\d+) (.*) (\d+)")


class WorldTokenizer(ByteLevelTokenizer):
    """The tokenizer of RWKV's models since "World". The token 0 ends a text and has no bytes.

    Args:
        tokens: each token's bytes and id, from 1 on; all single bytes are among them.
        special: the spellings of tokens that only a chat template can write, by id.
        name: what `open_tokenizer` would be given.

    Raises:
        DataError: tokens that cannot be.
    """

    separator = 0

    def __init__(self, tokens: Mapping[bytes, int], special: Mapping[int, str], name: str) -> None:
        self.name = name
        self._ids, self._special = dict(tokens), dict(special)
        self._bytes = {token: content for content, token in self._ids.items()}
        if len(self._bytes) < len(self._ids):
            raise DataError(f"the tokenizer {name!r} has two tokens of one id")
        if self._bytes and min(self._bytes) < 1:
            raise DataError(f"the tokenizer {name!r} has a token {min(self._bytes)}; 0 ends a text")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise DataError(f"the tokenizer {name!r} has no token for the byte {missing[0]:#04x}")
        for token, text in self._special.items():
            if not text or self._bytes.get(token, text.encode()) != text.encode():
                raise DataError(f"the tokenizer {name!r} calls the token {token} {text!r}, which it is not")
            self._bytes[token] = text.encode()
        self.vocab_size = max(self._bytes) + 1
        self._chat = {text: token for token, text in self._special.items()}
        spelled = sorted(map(re.escape, self._chat), key=len, reverse=True)
        self._spelled = re.compile(f"({'|'.join(spelled)})") if spelled else None
        lengths: dict[bytes, set[int]] = {}
        for content in self._ids:
            lengths.setdefault(content[:2], set()).add(len(content))
        # A text's next two bytes leave few lengths that a token can have, the longest first.
        self._lengths = {begin: sorted(found, reverse=True) for begin, found in lengths.items()}

    @property
    def special_tokens(self) -> frozenset[int]:
        return frozenset([self.separator, *self._special])

    def encode(self, text: str) -> list[int]:
        data, ids, at = valid_unicode(text).encode(), [], 0
        while at < len(data):
            found = self._longest(data, at)
            ids.append(self._ids[found])
            at += len(found)
        return ids

    def _longest(self, data: bytes, at: int) -> bytes:
        """The longest token that the bytes go on with."""
        for length in self._lengths.get(data[at : at + 2], ()):
            if (found := data[at : at + length]) in self._ids:
                return found
        return data[at : at + 1]

    def encode_chat(self, text: str) -> list[int]:
        if self._spelled is None:
            return self.encode(text)
        ids: list[int] = []
        for part in self._spelled.split(text):
            ids += [self._chat[part]] if part in self._chat else self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        kept = self.check_ids(ids)
        if unknown := [token for token in kept if token not in self._bytes]:
            raise DataError(f"the token {unknown[0]} is not in the vocabulary of {self.name!r}")
        return b"".join(self._bytes[token] for token in kept)

    def save(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        ordered = sorted(self._ids.items(), key=lambda each: each[1])
        lines = [f"{token} {_literal(content)!r} {len(content)}\n" for content, token in ordered]
        write_text(directory / _WRITTEN, "".join(lines))
        named = {str(token): {"content": text, "special": True} for token, text in self._special.items()}
        write_json(directory / _CONFIGURATION_FILE, {"added_tokens_decoder": named})
        write_json(directory / METADATA_FILE, {"kind": "world", "name": self.name})

    @functools.cached_property
    def _digest(self) -> str:
        content = (sorted(self._ids.items()), sorted(self._special.items()))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._digest


def load_world_tokenizer(file: Path, name: str) -> WorldTokenizer:
    """Read a vocabulary, and the names of special tokens from a `tokenizer_config.json` beside it.

    A line is an id, the token as Python writes a string or bytes, and how many bytes it has.

    Raises:
        DataError: a file is damaged.
    """
    tokens: dict[bytes, int] = {}
    try:
        # Not splitlines(): a token may be a separator of lines of Unicode's.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        content, token = _parsed(line.rstrip("\r"), f"{file}, line {number}")
        if content in tokens:
            raise DataError(f"{file}, line {number}: the token {content!r} is there twice")
        tokens[content] = token
    return WorldTokenizer(tokens, _special_tokens(file.parent / _CONFIGURATION_FILE), name)


def _parsed(line: str, where: str) -> tuple[bytes, int]:
    found = _LINE.fullmatch(line)
    try:
        value = ast.literal_eval(found[2]) if found else None
    except (ValueError, SyntaxError):
        value = None
    content = value.encode() if isinstance(value, str) else value
    if found is None or not isinstance(content, bytes) or not content:
        raise DataError(f"{where}: not an id, a token in quotes and its length: {line[:40]!r}")
    if len(content) != int(found[3]):
        raise DataError(f"{where}: the token has {len(content)} bytes, and the line says {found[3]}")
    return content, int(found[1])


def _special_tokens(file: Path) -> dict[int, str]:
    table: Any = read_object(file).get("added_tokens_decoder", {})
    special = {}
    for token, entry in table.items() if isinstance(table, dict) else [("", None)]:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not token.isdecimal() or not isinstance(text, str):
            raise DataError(f"{file}: added_tokens_decoder must name tokens by their ids; it has {token!r}")
        special[int(token)] = text
    return special or {0: SEPARATOR}


def _literal(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content
