"""What a tokenizer is, and decoding one token at a time."""

from __future__ import annotations

import codecs
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import DataError

SEPARATOR = "<|endoftext|>"
METADATA_FILE = "intarsia.json"


class DecodeStream(ABC):
    """Text from tokens as they come. What it has given is final: it never ends within a character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """Take a token and give the text that is now certain, often a word, sometimes nothing."""

    @abstractmethod
    def finish(self) -> str:
        """The text that is still held back; an incomplete character becomes U+FFFD. Resets the stream."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: what `open_tokenizer` would be given.
        vocab_size: every id is below it.
        separator: the id that stands before the first and after the last token of a document. No text
            encodes to it, not even its own spelling.
    """

    name: str
    vocab_size: int
    separator: int

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids that are no part of any text: the separator, and those whose spelling only a chat template may write."""
        return frozenset([self.separator])

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without separators."""

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of what a chat template has made, where the spelling of a special token means that token. Never
        for texts of unknown origin alone: they could end a turn and begin another. Without special tokens other than
        the separator this is `encode`."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of several texts, on all cores where the tokenizer can."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> list[NDArray]:
        """As `encode_batch`, in arrays of one unsigned integer type."""
        return [np.asarray(tokens, dtype=dtype) for tokens in self.encode_batch(texts)]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens. Separators are left out; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """

    @abstractmethod
    def decode_stream(self) -> DecodeStream:
        """An incremental decoder. All that it gives, joined, is what `decode` gives."""

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a directory, for `load_tokenizer`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digits that differ between tokenizers which may encode a text differently."""

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """`ids` without separators.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        kept = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"the token {token} is not in the vocabulary of {self.name!r} (0 to "
                    f"{self.vocab_size - 1})"
                )
            if token != self.separator:
                kept.append(token)
        return kept

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size})"


class ByteDecodeStream(DecodeStream):
    """For tokenizers whose every token is a string of bytes."""

    def __init__(self, tokenizer: ByteLevelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class ByteLevelTokenizer(Tokenizer):
    """A tokenizer whose every token is a string of bytes, so that any bytes can be decoded."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens, without separators."""

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self) -> DecodeStream:
        return ByteDecodeStream(self)


class TextDecodeStream(DecodeStream):
    """For any tokenizer: decodes the last few tokens again with each new one, and gives what was added.

    A decoder may need to see the tokens before (for a space in front of a word), so those that gave the last
    piece of text are decoded with the new ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0  # how many of the tokens have given their text

    def push(self, token: int) -> str:
        self._tokens += self._tokenizer.check_ids([token])
        before = self._tokenizer.decode(self._tokens[: self._given])
        after = self._tokenizer.decode(self._tokens)
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        self._tokens = self._tokens[self._given :]
        self._given = len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._given])
        after = self._tokenizer.decode(self._tokens)
        self._tokens, self._given = [], 0
        return after[len(before) :]
