"""What decoding loses on a busy machine: tokens a second with nothing else on the cores, and with a loop on each.

    python benchmarks/busy.py [--preset kimi-linear-small] [--weights bfloat16] [--loops 2] [--rounds 5]
                              [--llama LLAMA_BENCH --gguf MODEL] [--out FILE.json]

Phases alternate: idle, busy, idle, ... Busy are `--loops` processes that do nothing but run: with one on each core, two
threads can keep half of their speed, and one thread at most two thirds. Where `--llama` and `--gguf` are given,
`llama-bench` decodes in the same phases; what is compared is the share that each keeps, the models being different.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common import machine, median, options_parser, table, write_results
from intarsia.inference import generate
from intarsia.model import InferenceModel, LanguageModel, presets

PROMPT = 64


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that do nothing but run."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def our_decoding(preset: str, weights: str, tokens: int) -> Callable[[], float]:
    """Tokens a second of one sequence."""
    model = LanguageModel(presets.get(preset)).to(torch.bfloat16)
    model.init_weights(0)
    ready = InferenceModel(model, weights)  # type: ignore[arg-type]

    def decode() -> float:
        steps = generate(ready, [0] * PROMPT, max_tokens=tokens + 1)
        next(steps)
        begin = time.perf_counter()
        for _ in steps:
            pass
        return tokens / (time.perf_counter() - begin)

    decode()
    return decode


def llama_decoding(program: str, gguf: str, tokens: int, threads: int) -> Callable[[], float]:
    """The same of llama.cpp."""
    command = [program, "-m", gguf, "-t", str(threads), "-p", "0", "-n", str(tokens), "-r", "1", "-o", "json"]

    def run() -> float:
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(answer.stdout)[0]["avg_ts"])

    return run


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--preset", default="kimi-linear-small")
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48, help="of each phase")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", help="the program llama-bench")
    parser.add_argument("--gguf", help="its model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoders = {"intarsia": our_decoding(options.preset, options.weights, options.tokens)}
    if options.llama:
        decoders["llama.cpp"] = llama_decoding(options.llama, options.gguf, options.tokens, options.threads)
    found: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in decoders}
    for _ in range(options.rounds):
        for phase, loops in (("idle", 0), ("busy", options.loops)):
            with busy(loops):
                for name, decoder in decoders.items():
                    found[name][phase].append(decoder())
    results: list[dict[str, Any]] = []
    for name, phases in found.items():
        idle, loaded = median(phases["idle"]), median(phases["busy"])
        results.append(
            {
                "implementation": name,
                "idle": idle,
                "busy": loaded,
                "kept": loaded / idle,
                "slowest": min(phases["busy"]),
            }
        )
    table(results)
    if options.out:
        settings = {key: getattr(options, key) for key in ("preset", "weights", "tokens", "loops", "rounds")}
        write_results(options.out, {"machine": machine(), **settings, "results": results})


if __name__ == "__main__":
    with torch.no_grad():
        main()
