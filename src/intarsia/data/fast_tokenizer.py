"""Tokenizers that are a `tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.data.documents import valid_unicode
from intarsia.data.tokenizer_base import (
    METADATA_FILE,
    SEPARATOR,
    ByteLevelTokenizer,
    DecodeStream,
    TextDecodeStream,
    Tokenizer,
)
from intarsia.errors import DataError
from intarsia.files import write_json, write_text

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"

# The spellings of "this text ends here", in the order of preference; used where no configuration names one.
_USUAL_SEPARATORS = (
    SEPARATOR,
    "<|end_of_text|>",
    "<|eos|>",
    "[EOS]",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)


class FastTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        backend: the tokenizer; it is changed: truncation and padding are switched off.
        name: what `open_tokenizer` would be given.
        separator: the spelling of the separator. If None, a usual one that the vocabulary has; if it has
            none, `<|endoftext|>` is added as a new last id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str, separator: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        if separator is None:
            separator = next(
                (text for text in _USUAL_SEPARATORS if backend.token_to_id(text) is not None), SEPARATOR
            )
        if backend.token_to_id(separator) is None:
            before = set(backend.get_vocab(with_added_tokens=True).values())
            backend.add_special_tokens([separator])
            if backend.token_to_id(separator) in before:  # the library counts tokens, and the ids have gaps
                raise DataError(
                    f"the tokenizer {name!r} has no end-of-text token, and {separator!r} cannot be added to "
                    "it: "
                    "name one of its tokens as eos_token in a tokenizer_config.json beside it"
                )
        # A text that spells a special token is a text: "<|endoftext|>" in a source file must not end it.
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.backend = backend
        self.name = name
        self.separator_text = separator
        self.separator = vocabulary[separator]
        self.vocab_size = max(vocabulary.values()) + 1

    @functools.cached_property
    def special_tokens(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset([self.separator, *(token for token, text in added.items() if text.special)])

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        valid = [valid_unicode(text) for text in texts]
        found = self.backend.encode_batch_fast(valid, add_special_tokens=False)
        batch = [encoding.ids for encoding in found]
        # The switch above keeps special tokens out; some files declare theirs as ordinary added tokens.
        return [ids if self.separator not in ids else self._without_separator(ids) for ids in batch]

    @functools.cached_property
    def _for_chats(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are what they are spelled."""
        other = type(self.backend).from_str(self.backend.to_str())
        other.encode_special_tokens = False
        return other

    def encode_chat(self, text: str) -> list[int]:
        ids: list[int] = self._for_chats.encode(valid_unicode(text), add_special_tokens=False).ids
        return ids

    def _without_separator(self, ids: list[int]) -> list[int]:
        spelled = _pieces(self.backend, self.separator_text)
        return [piece for token in ids for piece in (spelled if token == self.separator else [token])]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(self.check_ids(ids), skip_special_tokens=False)

    def decode_stream(self) -> DecodeStream:
        return TextDecodeStream(self)

    def save(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        write_text(directory / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        # The two lines that transformers' AutoTokenizer needs to load the same directory.
        configuration = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.separator_text}
        write_json(directory / "tokenizer_config.json", configuration)
        metadata = {"kind": "fast", "name": self.name, "separator": self.separator_text}
        write_json(directory / METADATA_FILE, metadata)

    def fingerprint(self) -> str:
        content = f"{self.backend.to_str()}\n{self.separator}"
        return hashlib.sha256(content.encode()).hexdigest()


class FastByteLevelTokenizer(FastTokenizer, ByteLevelTokenizer):
    """A tokenizer of the `tokenizers` library whose tokens are strings of bytes, such as GPT-2's."""

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of every token."""
        table = byte_alphabet()
        added = {token: text.content for token, text in self.backend.get_added_tokens_decoder().items()}
        content = [b""] * self.vocab_size
        for text, token in self.backend.get_vocab(with_added_tokens=True).items():
            if token in added:
                content[token] = added[token].encode()
            else:
                content[token] = b"".join(table.get(character, character.encode()) for character in text)
        return content

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token] for token in self.check_ids(ids))

    def decode(self, ids: Iterable[int]) -> str:
        return ByteLevelTokenizer.decode(self, ids)

    def decode_stream(self) -> DecodeStream:
        return ByteLevelTokenizer.decode_stream(self)


def fast_tokenizer(backend: tokenizers.Tokenizer, name: str, separator: str | None = None) -> FastTokenizer:
    """Wrap a backend in the class that suits its decoder."""
    decoder: dict[str, Any] = json.loads(backend.to_str()).get("decoder") or {}
    kind = FastByteLevelTokenizer if decoder.get("type") == "ByteLevel" else FastTokenizer
    return kind(backend, name, separator)


def byte_alphabet() -> dict[str, bytes]:
    """The characters with which GPT-2 and its heirs write the 256 bytes in a vocabulary.

    Printable bytes stand for themselves; the others are numbered from U+0100 (openai/gpt-2, `encoder.py`).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update({chr(256 + index): bytes([byte]) for index, byte in enumerate(others)})
    return table


def _pieces(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The tokens of a text that would match an added token, encoded in two halves that do not."""
    middle = len(text) // 2
    return [
        token
        for half in (text[:middle], text[middle:])
        for token in backend.encode(half, add_special_tokens=False).ids
    ]


def load_fast_tokenizer(file: Path, name: str, separator: str | None = None) -> FastTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        DataError: the file is missing, or no tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error
    try:
        backend = Backend.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{file} is no tokenizer that the tokenizers library knows: {error}") from error
    return fast_tokenizer(backend, name, separator)
