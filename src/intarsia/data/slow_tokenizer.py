"""Tokenizers that only the `transformers` library can run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from intarsia.data.documents import valid_unicode
from intarsia.data.tokenizer_base import METADATA_FILE, SEPARATOR, DecodeStream, TextDecodeStream, Tokenizer
from intarsia.files import write_json


class SlowTokenizer(Tokenizer):
    """A tokenizer of `transformers` without a `tokenizer.json` (SentencePiece, tiktoken, plain Python).

    Its separator is its end-of-text token; if it has none, `<|endoftext|>` is added as a new last id.
    """

    def __init__(self, backend: Any, name: str) -> None:
        if backend.eos_token is None:
            backend.add_special_tokens({"eos_token": SEPARATOR})
        self.backend = backend
        self.name = name
        self.separator = int(backend.eos_token_id)
        self.vocab_size = max(backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_chat(self, text: str) -> list[int]:
        return self._encode([text], split_special_tokens=False)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts, split_special_tokens=True)

    def _encode(self, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
        valid = [valid_unicode(text) for text in texts]
        found = self.backend(
            valid,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in found["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(
            self.check_ids(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def decode_stream(self) -> DecodeStream:
        return TextDecodeStream(self)

    def save(self, directory: str | os.PathLike[str]) -> None:
        self.backend.save_pretrained(os.fspath(directory))
        write_json(Path(directory) / METADATA_FILE, {"kind": "slow", "name": self.name})

    def fingerprint(self) -> str:
        vocabulary = sorted(self.backend.get_vocab().items())
        content = (type(self.backend).__name__, str(self.backend.init_kwargs), vocabulary, self.separator)
        return hashlib.sha256(repr(content).encode()).hexdigest()
