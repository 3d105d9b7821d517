"""Decoding by recorded steps beside the same model called from Python, on a GPU.

    python benchmarks/gpu_decode.py [--presets kimi-linear-base,full-base] [--batches 1,64] [--context 1024]
        [--out FILE.json]

    called      `InferenceModel` over a pool, a step after the other
    recorded    `RecordedModel`: the same as CUDA graphs, each step with the most likely tokens of the one before
    weights     what reading all weights once would take at the bandwidth that a sum over a large tensor reaches here

Milliseconds for a token of every sequence; both take turns, and medians are compared. Before anything is timed the
logits are: `difference` is that of the two, relative and root mean square. Without a GPU it runs on the CPU, where
nothing is recorded, to see that it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import in_turn, machine, median, options_parser, table, write_results
from intarsia.model import InferenceModel, LanguageModel, presets
from intarsia.model.recorded import RecordedModel
from intarsia.model.states import ModelPool
from intarsia.ops import Sequences

Row = dict[str, Any]
STEPS = 16
"""Tokens of each sequence in a turn."""


def timed(device: torch.device, call: Callable[[], object]) -> Callable[[], float]:
    """Seconds that a call takes, its work on the device included."""

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return run


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over 1 GiB (64 MiB on a CPU)."""
    x = torch.ones((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    timer = timed(device, x.sum)
    timer()
    return x.nbytes / median([timer() for _ in range(7)])


def called(model: InferenceModel, pool: ModelPool, slots: list[int], tokens: Tensor) -> Tensor:
    """A step from Python: the logits `[N, V]`."""
    logits = model(tokens[None], pool.view(slots), Sequences((1,) * len(slots))).logits
    assert logits is not None
    return logits[0]


def measure(preset: str, batch: int, context: int, device: torch.device, seconds: float) -> Row:
    """The times of one model and batch."""
    model = LanguageModel(presets.get(preset, vocab_size=32000)).to(device, torch.bfloat16).eval()
    model.init_weights(0)
    ready = InferenceModel(model)
    room = batch * (context + 4096)
    decoder = RecordedModel(ready, batch, room)
    pool = ready.new_pool(batch, room)
    generator = torch.Generator().manual_seed(0)
    slots = list(range(batch))
    for _ in slots:
        prompt = torch.randint(0, 32000, (context,), generator=generator)
        decoder.read(decoder.pool.take(), prompt)
        ready(prompt[None].to(device), pool.view([pool.take()]))
    tokens = torch.randint(0, 32000, (batch,), generator=generator).to(device)
    one, other = called(ready, pool, slots, tokens).float(), decoder.step(slots, tokens).float()
    difference = float((one - other).norm() / one.norm())

    def from_python() -> None:
        chosen = tokens
        for _ in range(STEPS):
            chosen = called(ready, pool, slots, chosen).argmax(-1)

    def recorded() -> None:
        for _ in range(STEPS):
            decoder.step(slots)

    timers = {"called": timed(device, from_python), "recorded": timed(device, recorded)}
    for timer in timers.values():  # whatever a first call does
        timer()
    times = {way: median(found) / STEPS * 1e3 for way, found in in_turn(timers, seconds).items()}
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "preset": preset, "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6, "batch": batch,
        "context": context, "called_ms": times["called"], "recorded_ms": times["recorded"],
        "ratio": times["called"] / times["recorded"], "weights_ms": weights / bandwidth(device) * 1e3,
        "recordings": decoder.recordings, "difference": difference,
    }  # fmt: skip


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--presets", default="kimi-linear-base,full-base")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line, three rounds at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with torch.inference_mode():
        for preset in options.presets.split(","):
            for batch in options.batches.split(","):
                device = torch.device(options.device)
                new = measure(preset, int(batch), options.context, device, options.seconds)
                table([new], header=not rows)
                rows.append(new)
    if options.out:
        write_results(options.out, {"machine": machine(), "device": options.device, "rows": rows})


if __name__ == "__main__":
    main()
