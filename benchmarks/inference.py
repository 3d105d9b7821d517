"""How fast does a hybrid model read a prompt and decode, beside llama.cpp on the same weights?

    python benchmarks/inference.py [--llama BIN] [--weights bfloat16,int8,int4] [--contexts 1024,8192,32768]
                                   [--prompts 512,2048,8192] [--threads 2] [--out FILE.json]

The model: width 1024, six layers of KDA and two of MLA without positions, 8 heads of 128, feed-forwards of 3072, a
vocabulary of 32768; 180 M parameters, drawn at random, since the time does not depend on them. `--llama` is a folder
with `llama-bench` and `llama-quantize`: the model is written for them as GGUF, and quantised by llama.cpp itself
(Q8_0 beside int8, Q4_0 beside int4).

Both take turns: ours, then theirs, `--rounds` times, each with a few repetitions; medians are compared. Prompts are
read from nothing, tokens are decoded one by one behind `context` tokens that are in the states already. Ours is what
`generate` does: the logits of one token, its choice, and the next.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import machine, median, options_parser, table, write_results
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model import InferenceModel, LanguageModel, ModelConfig
from intarsia.model.config import FeedForwardConfig
from intarsia.model.states import ModelStates
from intarsia.ops.packed_weights import WeightFormat
from llama_gguf import KINDS, output_of, quantise, write_gguf

PIECE = 2048
"""Tokens of a prompt that are read at once, as many as llama-bench's batch."""


def example() -> LanguageModel:
    """The model of the comparison, in bfloat16."""
    config = ModelConfig(
        vocab_size=32768,
        d_model=1024,
        depth=8,
        layout="kda kda kda mla",
        mixers={
            "kda": KDAConfig(num_heads=8, head_dim=128),
            "mla": MLAConfig(num_heads=8, nope_dim=128, rope_dim=64, v_dim=128, kv_rank=512),
        },
        feed_forward=FeedForwardConfig(3072),
        tie_embeddings=False,
    )
    model = LanguageModel(config)
    model.init_weights(0)
    return model.to(torch.bfloat16)


class Ours:
    """One format of our weights."""

    def __init__(self, model: LanguageModel, weights: WeightFormat) -> None:
        self.model = InferenceModel(model, weights)
        self._read: dict[int, ModelStates] = {}

    def prompt_speed(self, tokens: int) -> float:
        """Tokens a second while a prompt is read."""
        prompt = torch.randint(0, self.model.config.vocab_size, (1, tokens))
        begin = time.perf_counter()
        self._after(prompt)
        return tokens / (time.perf_counter() - begin)

    def decode_speed(self, context: int, tokens: int) -> float:
        """Tokens a second behind `context` tokens, which are read at the first call alone."""
        if context not in self._read:
            self._read[context] = self._after(torch.randint(0, self.model.config.vocab_size, (1, context)))
        states, token = self._read[context], torch.zeros(1, 1, dtype=torch.long)
        begin = time.perf_counter()
        for _ in range(tokens):
            output = self.model(token, states)
            assert output.logits is not None
            assert output.states is not None
            states, token = output.states, torch.tensor([[int(output.logits[0, -1].argmax())]])
        return tokens / (time.perf_counter() - begin)

    def _after(self, prompt: torch.Tensor) -> ModelStates:
        states = self.model.init_states(1)
        for piece in prompt.split(PIECE, dim=1):
            output = self.model(piece, states)
            assert output.states is not None
            states = output.states
        return states

    def forget(self) -> None:
        """Free the states of the contexts."""
        self._read.clear()


@dataclass(frozen=True)
class Llama:
    """One GGUF file, timed by llama-bench."""

    program: Path
    file: Path
    threads: int

    def prompt_speeds(self, tokens: int, repetitions: int) -> list[float]:
        return self._run("-p", str(tokens), "-n", "0", "-r", str(repetitions))

    def decode_speeds(self, context: int, tokens: int, repetitions: int) -> list[float]:
        return self._run("-p", "0", "-n", str(tokens), "-d", str(context), "-r", str(repetitions))

    def _run(self, *arguments: str) -> list[float]:
        (result,) = json.loads(
            output_of(self.program, "-m", self.file, "-t", self.threads, "-o", "json", *arguments)
        )
        return [float(speed) for speed in result["samples_ts"]]


def peers_of(
    model: LanguageModel, folder: Path, formats: Iterable[str], llama: Path, threads: int
) -> dict[str, Llama]:
    """The model as llama.cpp reads it, in each format that it has."""
    plain = folder / "bfloat16.gguf"
    write_gguf(model, plain)
    found = {}
    for name in formats:
        file, kind = plain, KINDS.get(name)
        if kind is not None:
            file = folder / f"{kind}.gguf"
            quantise(llama, plain, file, kind, threads)
        elif name not in KINDS:
            continue
        found[name] = Llama(llama / "llama-bench", file, threads)
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--llama", type=Path, help="the folder with llama-bench and llama-quantize")
    parser.add_argument("--weights", default="bfloat16,int8,int4")
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--tokens", type=int, default=32, help="how many are decoded in a repetition")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    formats = options.weights.split(",")
    prompts, contexts = (
        [int(n) for n in text.split(",") if n] for text in (options.prompts, options.contexts)
    )
    model = example()
    about = {"machine": machine(), "parameters": sum(x.numel() for x in model.parameters())}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        if options.llama:
            peers = peers_of(model, Path(folder), formats, options.llama, options.threads)
        for name in formats:
            ours = Ours(model, name)
            for what, lengths in (("prompt", prompts), ("decode", contexts)):
                for length in lengths:
                    rows.append(compared(name, what, length, ours, peers.get(name), options))
                    table(rows[-1:], header=len(rows) == 1)
                    ours.forget()
                    if options.out:  # as they come: all of them take half an hour
                        write_results(options.out, {**about, "results": rows})


def compared(
    name: str, what: str, length: int, ours: Ours, peer: Llama | None, options: Any
) -> dict[str, Any]:
    """One row of the table: both speeds, in tokens a second, measured in turn."""
    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    if what == "prompt":
        ours.prompt_speed(min(length, PIECE))  # fetch memory
    else:
        ours.decode_speed(length, 4)
    for _ in range(options.rounds):
        for _ in range(options.repetitions):
            speeds["ours"].append(
                ours.prompt_speed(length) if what == "prompt" else ours.decode_speed(length, options.tokens)
            )
        if peer is not None:
            speeds["theirs"] += (
                peer.prompt_speeds(length, options.repetitions)
                if what == "prompt"
                else peer.decode_speeds(length, options.tokens, options.repetitions)
            )
    our, their = median(speeds["ours"]), median(speeds["theirs"]) if peer is not None else None
    return {
        "weights": name,
        "what": what,
        "tokens": length,
        "ours": our,
        "llama.cpp": their,
        "ratio": our / their if their else None,
        "slowest": min(speeds["ours"]),
        "fastest": max(speeds["ours"]),
        "megabytes": ours.model.weight_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
