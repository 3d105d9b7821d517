"""How fast do models of laptop size train, and how much faster than with another installation?

    python benchmarks/training_small.py [--before PYTHON] [--out FILE.json]

Such models are what experiments on one's own machine consist of: `exam` is a run of examples/replications/figure_4.toml
(width 64, two layers, two heads of 32, 64 rows of 64 tokens, multi-query recall, AdamW), `text` one like those of
examples/demo.toml (width 64, four layers, 4 rows of 128 tokens in two documents each, 1024 tokens in the vocabulary,
Muon), with each of several mixers. A step is one of the real loop, data of exams included, on one thread, with freed
memory kept as runs keep it. `--before` names the Python of another environment, whose Intarsia trains the same models
step by step in turn; the losses of its first steps must agree to rounding before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from common import Worker, in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.data.loader import Batch
from intarsia.jobs.freed_memory import keep_freed_memory
from intarsia.model import ModelConfig, presets
from intarsia.ops import Sequences
from intarsia.tasks.mqar import MQAR
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner

HEADS = {"num_heads": 2, "head_dim": 32}
MLA = {"num_heads": 2, "nope_dim": 32, "v_dim": 32, "kv_rank": 16, "rope_dim": 16}
EXAM: dict[str, dict[str, Any]] = {
    "kda": HEADS,
    "gdn": HEADS,
    "mamba2": {**HEADS, "state_dim": 32, "num_groups": 2},
    "mla": MLA,
    "attention": HEADS,
}
TEXT = ("kimi-linear-nano", "gdn-hybrid-nano", "full-nano")
CHECKED = 5
"""Steps whose losses must agree, relatively to `TOLERANCE`: roundings grow from step to step."""
TOLERANCE = 1e-4


def exam(name: str) -> Callable[[int], float]:
    """A step of a run for an exam, by its number."""
    task = MQAR(length=64)
    mixers = {name: {"type": name, **EXAM[name]}}
    model = {"vocab_size": task.vocab_size, "d_model": 64, "depth": 2, "layout": name, "mixers": mixers}
    config = TrainConfig(
        steps=1500, rows=64, length=64, optimizer="adamw", schedule="cosine", final_lr_fraction=0.1, lr=5e-3,
        warmup_steps=75,
    )  # fmt: skip
    whole = {**model, "feed_forward": {"d_hidden": 128}, "init_std": 0.125}
    learner = Learner.new(ModelConfig.from_dict(whole), config, Processes())
    seqs = Sequences((config.length,) * config.rows)

    def step(number: int) -> float:
        inputs, targets = task.examples(0, range(number * config.rows, (number + 1) * config.rows))
        batch = Batch(inputs.view(1, -1), targets.view(1, -1), seqs, text_bytes=0, digest="", epoch=0)
        return learner.step(batch, number).loss

    return step


def text(name: str) -> Callable[[int], float]:
    """A step of a run on text, by its number."""
    model = presets.get(name, vocab_size=1024).to_dict()
    model["d_model"], model["feed_forward"]["d_hidden"] = 64, 176
    for kind, options in model["mixers"].items():
        options.update(MLA if kind == "mla" else HEADS)
    config = TrainConfig(steps=1500, rows=4, length=128, lr=4e-3, warmup_steps=10, adamw_lr_scale=3.0)
    learner = Learner.new(ModelConfig.from_dict(model), config, Processes())
    seqs = Sequences((67, 61) * config.rows)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (64, config.tokens_per_step + 1), generator=generator)

    def step(number: int) -> float:
        row = tokens[number % 64, None]
        batch = Batch(
            row[:, :-1].contiguous(), row[:, 1:].contiguous(), seqs, text_bytes=0, digest="", epoch=0
        )
        return learner.step(batch, number).loss

    return step


def serve(case: str) -> None:
    """Be one of the two: answer each line with the loss of a step, and from some steps on with its seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    kind, name = case.split(":")
    step = exam(name) if kind == "exam" else text(name)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        print(step(number) if number < CHECKED else stopwatch(step, number)(), flush=True)


def measure(case: str, pythons: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        workers = {
            which: stack.enter_context(Worker([python, __file__, "--serve", case]))
            for which, python in pythons.items()
        }
        # The first answers are losses.
        losses = {which: [worker.seconds() for _ in range(CHECKED)] for which, worker in workers.items()}
        for found in losses.values():
            if any(abs(a - b) > TOLERANCE * abs(b) for a, b in zip(found, losses["now"], strict=True)):
                raise RuntimeError(f"the losses differ, so the times mean nothing: {losses}")
        times = in_turn({which: worker.seconds for which, worker in workers.items()}, seconds, turn=0.2)
    kind, name = case.split(":")
    tokens = 64 * 64 if kind == "exam" else 4 * 128
    return [
        {
            "run": kind,
            "model": name,
            "installation": which,
            "milliseconds": 1e3 * median(values),
            "tokens_per_second": tokens / median(values),
            "speedup": median(times.get("before", values)) / median(values),
            "loss": losses[which][-1],
            "steps": len(values),
        }
        for which, values in times.items()
    ]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument(
        "--cases", default=",".join([*(f"exam:{x}" for x in EXAM), *(f"text:{x}" for x in TEXT)])
    )
    parser.add_argument("--before", help="the Python of an environment with another Intarsia")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parser.add_argument("--serve", help="used by the benchmark itself")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    torch.set_num_threads(1)
    pythons = {"now": sys.executable} | ({"before": options.before} if options.before else {})
    rows: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        found = measure(case, pythons, options.seconds)
        table(found, header=not rows)
        rows += found
    if options.out:
        write_results(options.out, {"machine": machine(), "training_small": rows})


if __name__ == "__main__":
    main()
