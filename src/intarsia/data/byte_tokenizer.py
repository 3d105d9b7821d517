"""The tokenizer that needs no training: a token is a byte."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intarsia.data.documents import digest, valid_unicode
from intarsia.data.tokenizer_base import METADATA_FILE, ByteLevelTokenizer
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
        write_json(Path(directory) / METADATA_FILE, {"kind": "bytes", "name": self.name})

    def fingerprint(self) -> str:
        return digest("bytes", 1)
