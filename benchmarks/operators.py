"""Time and memory of the linear operators against transformers' functions, in one run.

    python benchmarks/operators.py [--lengths 512,2048,8192] [--dtypes float32] [--backward] [--out FILE.json]

Each line is one operator at one length. The implementations run in turn, so that a slow phase of the machine
meets all of them, and the medians are compared. Outputs are compared before anything is timed. Peak memory is
that of a fresh process which runs the call once, less what the process held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from common import in_turn, machine, median, options_parser, peak_memory, stopwatch, table, write_results
from delta_rule import DIM, HEADS, Call, Inputs, backward, flops, forward, inputs, ours, transformers


def candidates(decay: str, with_backward: bool) -> dict[str, Call]:
    """The implementations to compare; the recurrent forms write in place and have no gradient."""
    found = {"intarsia chunked": ours("chunked"), "transformers chunk": transformers("chunk", decay)}
    return found if with_backward else {**found, "transformers recurrent": transformers("recurrent", decay)}


def run(call: Call, x: Inputs, with_backward: bool) -> Tensor:
    return backward(call, x)[0] if with_backward else forward(call, x)


def measure(
    length: int, decay: str, dtype: torch.dtype, with_backward: bool, seconds: float
) -> list[dict[str, Any]]:
    x = inputs(length, decay, dtype)
    calls = candidates(decay, with_backward)
    outputs = {name: run(call, x, with_backward).float() for name, call in calls.items()}
    expected = outputs["transformers chunk"]
    timers = {name: stopwatch(run, call, x, with_backward) for name, call in calls.items()}
    times = in_turn(timers, seconds)
    our_time = median(times["intarsia chunked"])
    return [
        {
            "decay": decay,
            "T": length,
            "dtype": str(dtype).removeprefix("torch."),
            "pass": "forward+backward" if with_backward else "forward",
            "implementation": name,
            "milliseconds": 1e3 * median(values),
            "ratio_to_ours": median(values) / our_time,
            "gflops_per_second": (3 if with_backward else 1) * flops(length) / median(values) / 1e9,
            "peak_mib": peak_of(name, length, decay, dtype, with_backward),
            "largest_difference": float((outputs[name] - expected).abs().max()),
            "runs": len(values),
        }
        for name, values in times.items()
    ]


def peak_of(name: str, length: int, decay: str, dtype: torch.dtype, with_backward: bool) -> float:
    """Peak memory of one call above what its process held before, MiB, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--lengths", str(length), "--decays", decay]
    command += ["--dtypes", str(dtype).removeprefix("torch."), "--threads", str(torch.get_num_threads())]
    result = subprocess.run(
        command + ["--backward"] * with_backward, capture_output=True, text=True, check=True
    )
    return float(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--decays", default="channel,head")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--backward", action="store_true", help="forward and backward instead of forward alone"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line, at least three runs")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [int(n) for n in options.lengths.split(",")]
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    if options.peak_of:
        decay = options.decays
        call = candidates(decay, options.backward)[options.peak_of]
        run(call, inputs(64, decay, dtypes[0]), options.backward)  # whatever a first call allocates for good
        x = inputs(lengths[0], decay, dtypes[0])
        print(peak_memory(lambda: run(call, x, options.backward)))
        return
    rows: list[dict[str, Any]] = []
    for decay in options.decays.split(","):
        for dtype in dtypes:
            for length in lengths:
                new = measure(length, decay, dtype, options.backward, options.seconds)
                table(new, header=not rows)
                rows += new
    if options.out:
        write_results(options.out, {"machine": machine(), "heads": HEADS, "dim": DIM, "rows": rows})


if __name__ == "__main__":
    main()
