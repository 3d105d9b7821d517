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
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import machine, peak_memory, table, write_results
from intarsia.ops import gated_delta_rule

HEADS, DIM = 8, 128
Call = Callable[[dict[str, Tensor]], Tensor]


def inputs(length: int, decay: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Normalised q and k, and decays as KDA or Gated DeltaNet has them after initialisation."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (F.normalize(normal(1, length, HEADS, DIM), dim=-1).to(dtype) for _ in range(2))
    shape = (1, length, HEADS, DIM) if decay == "channel" else (1, length, HEADS)
    rate = torch.exp(2.7 * torch.rand(HEADS, generator=generator)).view(HEADS, *[1] * (len(shape) - 3))
    return {
        "q": q,
        "k": k,
        "v": normal(1, length, HEADS, DIM).to(dtype),
        "g": -rate * F.softplus(normal(*shape) - 4),
        "beta": torch.rand(1, length, HEADS, generator=generator),
    }


def ours(x: dict[str, Tensor]) -> Tensor:
    return gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], impl="chunked")[0]


def _positional(function: Callable[..., Any]) -> Call:
    def call(x: dict[str, Tensor]) -> Tensor:
        o = function(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=None, output_final_state=False
        )
        return o[0]

    return call


def transformers_kda(form: str) -> Call:
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    name = {"chunk": "chunk_kimi_delta_attention", "recurrent": "recurrent_kimi_delta_attention"}[form]
    function = getattr(kimi, name)
    return _positional(function)


def transformers_gdn(form: str) -> Call:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    name = {"chunk": "torch_chunk_gated_delta_rule", "recurrent": "torch_recurrent_gated_delta_rule"}[form]
    function = getattr(qwen, name)
    return _positional(function)


def candidates(decay: str, backward: bool) -> dict[str, Call]:
    """The implementations to compare; the recurrent forms write in place and have no gradient."""
    theirs = transformers_kda if decay == "channel" else transformers_gdn
    found = {"intarsia chunked": ours, "transformers chunk": theirs("chunk")}
    return found if backward else {**found, "transformers recurrent": theirs("recurrent")}


def run(call: Call, x: dict[str, Tensor], backward: bool) -> Tensor:
    if not backward:
        with torch.inference_mode():
            return call(x)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    o = call(leaves)
    o.sum().backward()
    return o.detach()


def measure(
    length: int, decay: str, dtype: torch.dtype, backward: bool, seconds: float
) -> list[dict[str, Any]]:
    x = inputs(length, decay, dtype)
    calls = candidates(decay, backward)
    outputs = {name: run(call, x, backward).float() for name, call in calls.items()}
    expected = outputs["transformers chunk"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while min(map(len, times.values())) < 3 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            begin = time.perf_counter()
            run(call, x, backward)
            times[name].append(time.perf_counter() - begin)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    rows: list[dict[str, Any]] = []
    for name, median in medians.items():
        flops = HEADS * length * (6 * DIM * DIM + 3 * 64 * DIM + 64 * 64)
        rows.append(
            {
                "decay": decay,
                "T": length,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": "forward+backward" if backward else "forward",
                "implementation": name,
                "milliseconds": 1e3 * median,
                "ratio_to_ours": median / medians["intarsia chunked"],
                "gflops_per_second": (3 if backward else 1) * flops / median / 1e9,
                "peak_mib": peak_of(name, length, decay, dtype, backward),
                "largest_difference": float((outputs[name] - expected).abs().max()),
                "runs": len(times[name]),
            }
        )
    return rows


def peak_of(name: str, length: int, decay: str, dtype: torch.dtype, backward: bool) -> float:
    """Peak memory of one call above what its process held before, MiB, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--lengths", str(length), "--decays", decay]
    command += ["--dtypes", str(dtype).removeprefix("torch."), "--threads", str(torch.get_num_threads())]
    result = subprocess.run(command + ["--backward"] * backward, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--decays", default="channel,head")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--backward", action="store_true", help="forward and backward instead of forward alone"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line, at least three runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="where to write the results as JSON")
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
