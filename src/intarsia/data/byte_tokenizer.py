"""The tokenizer that needs no training: a token is a byte."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.data.documents import digest, valid_unicode
from intarsia.data.fast_tokenizer import TOKENIZER_FILE, byte_alphabet
from intarsia.data.tokenizer_base import METADATA_FILE, SEPARATOR, ByteLevelTokenizer
from intarsia.files import write_json


class ByteTokenizer(ByteLevelTokenizer):
    """UTF-8 bytes as tokens 0 to 255, and a separator, 256."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> list[int]:
        return list(valid_unicode(text).encode())

    def encode_bytes(self, content: bytes) -> list[int]:
        """The tokens of any bytes, UTF-8 or not; `decode_bytes` gives them back."""
        return list(content)

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> list[NDArray]:
        return [np.frombuffer(valid_unicode(text).encode(), np.uint8).astype(dtype) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(self.check_ids(ids))

    def save(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        write_json(directory / METADATA_FILE, {"kind": "bytes", "name": self.name})
        # For transformers and others, which read tokens from files.
        write_json(directory / TOKENIZER_FILE, _for_others())
        configuration = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SEPARATOR}
        write_json(directory / "tokenizer_config.json", configuration)

    def fingerprint(self) -> str:
        return digest("bytes", 1)


def _for_others() -> dict[str, Any]:
    """The same as a `tokenizer.json`: a BPE that merges nothing."""
    ids = {character: byte[0] for character, byte in byte_alphabet().items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": ByteTokenizer.separator, "content": SEPARATOR, "special": True}
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | as_it_is],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": dict(sorted(ids.items(), key=lambda item: item[1])), "merges": []},
    }
