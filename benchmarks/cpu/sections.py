"""The native CPU kernels beside what else runs the delta rule on a CPU, in one run.

    python benchmarks/cpu [--sections forward,backward,...] [--vllm LIBRARY] [--llama PROGRAM] [--out FILE.json]

    machine    what the machine can do: products of matrices in oneDNN, reading and writing memory
    forward    KDA (a decay of each channel) and Gated DeltaNet (of each head) beside every peer
    backward   forward and backward together, and as a multiple of forward
    decode     the step of one token, of one sequence and of many, whose states fill the memory
    float32    the kernels of each instruction set, float32
    bfloat16   the same, bfloat16
    scaling    one thread against more
    lengths    time a token from 512 tokens to a million

Whatever is compared runs in turn, so that a slow phase of the machine meets all of it, and medians are
compared. Outputs are checked before anything is timed: against the float64 reference up to 512 tokens, against
the chunked form in float64 beyond. "share_of_product" is the rate (FLOP by the Kimi Linear report's equation
13) as a share of what oneDNN's product of two large matrices reaches in that dtype, measured when the run starts.

benchmarks/README.md says how to get the peers; those that are not given are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from checks import Row, leave_out
from growth import measure_lengths, measure_scaling
from instruction_sets import measure_bfloat16, measure_float32
from reachable import measure_machine
from served import serve
from steps import measure_decode
from whole_sequences import measure_backward, measure_forward

from common import machine, options_parser, table, write_results
from delta_rule import DIM, HEADS
from intarsia.errors import UnsupportedError

SECTIONS: dict[str, Callable[[argparse.Namespace, Row], Iterator[list[Row]]]] = {
    "forward": measure_forward,
    "backward": measure_backward,
    "decode": measure_decode,
    "float32": measure_float32,
    "bfloat16": measure_bfloat16,
    "scaling": measure_scaling,
    "lengths": measure_lengths,
}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--decays", default="channel,head")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--lengths", help="of forward, backward and the instruction sets; 512,2048,8192")
    parser.add_argument("--seconds", type=float, help="for each comparison, at least three rounds; 3")
    parser.add_argument("--quick", action="store_true", help="one short length, little time")
    parser.add_argument(
        "--skip", default="", help="leave out implementations with one of these words in the name"
    )
    parser.add_argument("--impl", default="cpu", help="whose instruction sets are compared")
    parser.add_argument(
        "--vllm", default=os.environ.get("INTARSIA_BENCH_VLLM"),
        help="vLLM's library, _C.abi3.so; INTARSIA_BENCH_VLLM by default",
    )  # fmt: skip
    parser.add_argument(
        "--llama", default=os.environ.get("INTARSIA_BENCH_LLAMA"),
        help="the program built from peers/ggml_delta_rule.cpp; INTARSIA_BENCH_LLAMA by default",
    )  # fmt: skip
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    sections = options.sections.split(",")
    if unknown := set(sections) - {*SECTIONS, "machine"}:
        parser.error(
            f"there is no section {', '.join(sorted(unknown))}; there are machine, {', '.join(SECTIONS)}"
        )
    torch.set_num_threads(options.threads)
    options.seconds = options.seconds or (0.3 if options.quick else 3.0)
    lengths = options.lengths or ("512" if options.quick else "512,2048,8192")
    options.decays = options.decays.split(",")
    options.dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    options.cells = [
        (decay, dtype, int(length))
        for decay in options.decays
        for dtype in options.dtypes
        for length in lengths.split(",")
    ]

    print("\nmachine")
    rates = measure_machine(options)
    table(rates)
    results: dict[str, Any] = {"machine": machine(), "heads": HEADS, "dim": DIM, "rates": rates}
    for section in sections:
        if section == "machine":
            continue
        print(f"\n{section}")
        rows: list[Row] = []
        results[section] = rows
        try:
            for new in SECTIONS[section](options, rates[0]):
                table(new, header=not rows)
                rows += new
        except UnsupportedError as error:
            leave_out(f"{section}: {error}")
    if len(sections) > 1:
        print("\nmachine, at the end")
        rates += measure_machine(options)
        table(rates[1:])
    if options.out:
        write_results(options.out, results)
