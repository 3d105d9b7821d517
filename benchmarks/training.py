"""How much faster does a small hybrid train with the native CPU kernels than with the operators in PyTorch?

    python benchmarks/training.py [--presets kimi-linear-tiny,gdn-hybrid-tiny] [--out FILE.json]

A step is one of `intarsia train` on random tokens: forward, loss, backward, clipping and AdamW. Two processes take
turns, one of them with INTARSIA_CPU_ISA=off, which leaves the operators to their chunkwise form in PyTorch, and the
short convolution and the gated norm to PyTorch as well; medians are compared. Their first losses must agree before
anything is timed.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

import torch

from common import Worker, in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.data.loader import Batch
from intarsia.model import presets
from intarsia.ops import Sequences, native
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner

Task = dict[str, Any]
FORMS = {"native": {}, "PyTorch": {native.ISA_VARIABLE: native.OFF}}
VOCABULARY = 2048


def serve(task: Task) -> None:
    """Be one of the two: train a step, print its loss, and answer each line with the seconds of a step."""
    torch.set_num_threads(task["threads"])
    config = TrainConfig(
        steps=1, rows=task["rows"], length=task["length"], optimizer="adamw", lr=1e-4, schedule="constant",
        precision=task["precision"],
    )  # fmt: skip
    learner = Learner.new(presets.get(task["preset"], vocab_size=VOCABULARY), config, Processes())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (1, config.tokens_per_step + 1), generator=generator)
    rows = Sequences((config.length,) * config.rows)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], rows, text_bytes=tokens.numel(), digest="", epoch=0)

    def step() -> float:
        return learner.step(batch, 0).loss

    first = step()
    print("ready", flush=True)
    sys.stdin.readline()
    print(first, flush=True)
    timer = stopwatch(step)
    for _ in sys.stdin:
        print(timer(), flush=True)


def measure(task: Task, seconds: float) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        workers = {
            form: stack.enter_context(
                Worker([sys.executable, __file__, "--serve", json.dumps(task)], environment)
            )
            for form, environment in FORMS.items()
        }
        losses = {form: worker.seconds() for form, worker in workers.items()}  # the first answer is the loss
        if abs(losses["native"] - losses["PyTorch"]) > 1e-2:
            raise RuntimeError(f"the losses differ, so the times mean nothing: {losses}")
        times = in_turn({form: worker.seconds for form, worker in workers.items()}, seconds, turn=0.5)
    tokens = task["rows"] * task["length"]
    return [
        {
            **{name: task[name] for name in ("preset", "precision", "rows", "length")},
            "operators": form,
            "milliseconds": 1e3 * median(values),
            "tokens_per_second": tokens / median(values),
            "speedup": median(times["PyTorch"]) / median(values),
            "loss": losses[form],
            "steps": len(values),
        }
        for form, values in times.items()
    ]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--presets", default="kimi-linear-tiny,gdn-hybrid-tiny")
    parser.add_argument("--precisions", default="float32,bf16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each pair")
    parser.add_argument("--serve", help="used by the benchmark itself")
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for preset in options.presets.split(","):
        for precision in options.precisions.split(","):
            task = {"preset": preset, "precision": precision, "rows": options.rows, "length": options.length}
            pair = measure({**task, "threads": options.threads}, options.seconds)
            table(pair, header=not rows)
            rows += pair
    if options.out:
        write_results(options.out, {"machine": machine(), "training": rows})


if __name__ == "__main__":
    main()
