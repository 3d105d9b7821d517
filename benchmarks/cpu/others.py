"""The peers that are not Python functions of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import Worker
from delta_rule import DIM, Call, Inputs


def vllm(library: str) -> Call:
    """vLLM's chunked Gated DeltaNet; it normalises q and k itself and writes the final state into the initial."""
    torch.ops.load_library(library)
    function = torch.ops._C.chunk_gated_delta_rule_cpu
    index = torch.zeros(1, dtype=torch.int32)

    def call(x: Inputs) -> Tensor:
        length, heads = x["q"].shape[1:3]
        state = torch.zeros(1, heads, DIM, DIM)
        spans = torch.tensor([0, length], dtype=torch.int32)
        beta = x["beta"].to(x["q"].dtype)
        return function(x["q"], x["k"], x["v"], x["g"], beta, state, True, spans, False, True, index, 1e-6)[0]

    return call


@contextmanager
def llama(program: str, x: Inputs, threads: int) -> Iterator[tuple[Worker, Tensor]]:
    """ggml's operator, token by token in float32, in a process of its own, and what it returns."""
    _, length, heads, dim = x["q"].shape
    decay = "channel" if x["g"].dim() == 4 else "head"
    with tempfile.TemporaryDirectory() as directory:
        given, returned = Path(directory, "inputs"), Path(directory, "output")
        with given.open("wb") as file:
            for name in ("q", "k", "v", "g", "beta"):
                file.write(x[name].float().contiguous().numpy().tobytes())
        arguments = (heads, dim, length, decay, threads, given, returned)
        with Worker([program, *map(str, arguments)]) as worker:
            yield worker, torch.from_numpy(np.fromfile(returned, dtype=np.float32))
