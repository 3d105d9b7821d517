"""Kimi's tokenizer: a `tiktoken.model` with the ranks of byte pairs, cut by its own expression, run by `tiktoken`."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from intarsia.data.documents import valid_unicode
from intarsia.data.tokenizer_base import METADATA_FILE, ByteLevelTokenizer
from intarsia.errors import DataError
from intarsia.extras import require
from intarsia.files import write_json, write_text

TIKTOKEN_FILE = "tiktoken.model"
CONFIGURATION_FILE = "tokenizer_config.json"
CLASS = "TikTokenTokenizer"
SPECIAL = 256
"""Ids behind the ranks, for special tokens; those without a name are reserved."""
LONGEST_CALL, LONGEST_RUN = 400_000, 25_000
"""Characters. Kimi's tokenizer cuts a text after so many, and a run of blanks, or of what is none, after so many; no
token goes over such a cut."""


def pattern() -> str:
    """The expression that cuts a text into the pieces of which each is made tokens alone. Chinese characters stand
    together and never with other letters; a word begins at a capital (camelCase is two) and takes its contraction with
    it; numbers have three digits at most."""
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    before, contraction = r"[^\r\n\p{L}\p{N}]?", "(?i:" + "|".join(f"'{x}" for x in CONTRACTIONS) + ")?"
    words = [f"{before}{upper}*{lower}+{contraction}", f"{before}{upper}+{lower}*{contraction}"]
    signs, lines = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+"
    return "|".join([r"[\p{Han}]+", *words, r"\p{N}{1,3}", signs, lines, r"\s+(?!\S)", r"\s+"])


CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")


class TiktokenTokenizer(ByteLevelTokenizer):
    """A tokenizer of Kimi's models.

    Args:
        ranks: every token's bytes and id, from 0 on; all single bytes are among them.
        special: the spellings of special tokens, by id: of the first 256 behind the ranks. The others are reserved.
        separator: the spelling of the one that ends a text.
        name: what `open_tokenizer` would be given.

    Raises:
        DataError: ranks or special tokens that cannot be.
        MissingExtraError: `tiktoken` is not installed.
    """

    def __init__(
        self, ranks: Mapping[bytes, int], special: Mapping[int, str], separator: str, name: str
    ) -> None:
        count = len(ranks)
        if sorted(ranks.values()) != list(range(count)):
            raise DataError(
                f"the tokenizer {name!r} has {count} tokens, and their ranks are not 0 to {count - 1}"
            )
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise DataError(f"the tokenizer {name!r} has no token for the byte {missing[0]:#04x}")
        if wrong := [token for token in special if not count <= token < count + SPECIAL]:
            raise DataError(
                f"the tokenizer {name!r} names {wrong[0]} as a special token; those are "
                f"{count} to {count + SPECIAL - 1}"
            )
        spelled = [
            special.get(token, f"<|reserved_token_{token}|>") for token in range(count, count + SPECIAL)
        ]
        if len(set(spelled)) < SPECIAL:
            raise DataError(f"the tokenizer {name!r} has two special tokens of one spelling")
        if separator not in spelled:
            raise DataError(
                f"the tokenizer {name!r} has no token {separator!r}, which it names as its eos_token"
            )
        self.name, self.vocab_size = name, count + SPECIAL
        self.separator, self.separator_text = count + spelled.index(separator), separator
        self._ranks, self._special = dict(ranks), dict(special)
        self._bytes = [*sorted(ranks, key=ranks.__getitem__), *(text.encode() for text in spelled)]
        self._encoding = require("tiktoken", "tiktoken").Encoding(
            name,
            pat_str=pattern(),
            mergeable_ranks=self._ranks,
            special_tokens={text: count + n for n, text in enumerate(spelled)},
        )

    @property
    def special_tokens(self) -> frozenset[int]:
        return frozenset(range(len(self._ranks), self.vocab_size))

    def encode(self, text: str) -> list[int]:
        pieces = cut(valid_unicode(text))
        return [token for piece in pieces for token in self._encoding.encode_ordinary(piece)]

    def encode_chat(self, text: str) -> list[int]:
        pieces = cut(valid_unicode(text))
        return [token for piece in pieces for token in self._encoding.encode(piece, allowed_special="all")]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token] for token in self.check_ids(ids))

    def save(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        tokens = sorted(self._ranks, key=self._ranks.__getitem__)
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
        write_text(directory / TIKTOKEN_FILE, "".join(lines))
        named = {str(token): {"content": text, "special": True} for token, text in self._special.items()}
        configuration = {
            "tokenizer_class": CLASS,
            "eos_token": self.separator_text,
            "added_tokens_decoder": named,
        }
        write_json(directory / CONFIGURATION_FILE, configuration)
        write_json(directory / METADATA_FILE, {"kind": "tiktoken", "name": self.name})

    @functools.cached_property
    def _digest(self) -> str:
        content = (self._bytes, self.separator, pattern())
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._digest


def cut(text: str) -> Iterator[str]:
    """The parts of a text over whose ends no token goes."""
    for start in range(0, len(text), LONGEST_CALL):
        part, begin = text[start : start + LONGEST_CALL], 0
        for run in re.finditer(r"\s+|\S+", part):
            for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def load_tiktoken_tokenizer(folder: Path, name: str) -> TiktokenTokenizer:
    """Read a `tiktoken.model`, and the names of special tokens from the `tokenizer_config.json` beside it.

    Raises:
        DataError: a file is damaged, or of a model that cuts its texts in another way.
        MissingExtraError: `tiktoken` is not installed.
    """
    file = folder / CONFIGURATION_FILE
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the special tokens of a {TIKTOKEN_FILE} stand in {file}, which cannot be read: {error}"
        ) from error
    if not isinstance(options, dict):
        raise DataError(f"{file} does not hold a JSON object")
    if (kind := options.get("tokenizer_class", CLASS)) != CLASS:
        raise DataError(f"{file}: how a {kind} cuts a text is not known; only Kimi's {CLASS} is")
    special = {}
    for token, entry in _table(file, options).items():
        text = spelling(entry)
        if not token.isdecimal() or text is None:
            raise DataError(f"{file}: added_tokens_decoder must name tokens by their ids; it has {token!r}")
        special[int(token)] = text
    return TiktokenTokenizer(
        _read_ranks(folder / TIKTOKEN_FILE), special, spelling(options.get("eos_token")) or "[EOS]", name
    )


def spelling(entry: Any) -> str | None:
    """The text of a token, as configurations have it: alone, or with its properties."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _table(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    table = options.get("added_tokens_decoder", {})
    if not isinstance(table, dict):
        raise DataError(f"{file}: added_tokens_decoder is no table")
    return table


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not a token in base64 and its rank: {error}") from error
    return ranks
