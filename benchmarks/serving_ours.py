"""The server of `serving.py`: a model that transformers has saved, and words of their own as tokens.

python benchmarks/serving_ours.py FOLDER PORT TOKENS SEQUENCES STEP_TOKENS STEP_SECONDS THREADS WEIGHTS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import cast

import torch
import uvicorn

from intarsia.checkpoints.opening import load
from intarsia.data.published import Conduct
from intarsia.data.tokenizer_base import ByteLevelTokenizer
from intarsia.errors import UnsupportedError
from intarsia.inference import Engine, EngineSettings
from intarsia.inference.server import Limits, Served
from intarsia.inference.server.app import create_app
from intarsia.inference.worker import Worker
from intarsia.model import InferenceModel
from intarsia.ops.packed_weights import WeightFormat
from serving_clients import MODEL


class Words(ByteLevelTokenizer):
    """Token 700 is the word ` w700`. Prompts come as tokens."""

    name, vocab_size, separator = "words", 32768, 0

    def encode(self, text: str) -> list[int]:
        raise UnsupportedError("prompts come as tokens")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(b" w%d" % token for token in self.check_ids(ids))

    def save(self, directory: str | os.PathLike[str]) -> None:
        raise UnsupportedError("this tokenizer is not kept")

    def fingerprint(self) -> str:
        return self.name


def main() -> None:
    port, tokens, sequences, step_tokens = map(int, sys.argv[2:6])
    step_seconds, threads = float(sys.argv[6]), int(sys.argv[7])
    torch.set_num_threads(threads)
    settings = EngineSettings(
        sequences=sequences, tokens=tokens, step_tokens=step_tokens, step_seconds=step_seconds,
        piece=step_tokens, drafts=0,
    )  # fmt: skip
    worker = Worker(Engine(InferenceModel(load(sys.argv[1]), cast(WeightFormat, sys.argv[8])), settings))
    limits = Limits(body_bytes=1 << 28)
    served = Served(MODEL, worker, Words(), None, Conduct(), limits)
    uvicorn.run(create_app(served), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
