"""The native CPU kernels beside what else runs the delta rule on a CPU, in one run.

    python benchmarks/cpu.py [--sections forward,backward,...] [--vllm LIBRARY] [--llama PROGRAM] [--out FILE.json]

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
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import (
    Worker,
    available_memory,
    in_turn,
    machine,
    median,
    options_parser,
    peak_memory,
    stopwatch,
    table,
    write_results,
)
from decode import (
    CHANNELS,
    FORMS,
    exact_outputs,
    our_operators,
    our_step,
    parts,
    step_inputs,
    transformers_step,
    vllm_step,
)
from delta_rule import (
    DIM,
    HEADS,
    Call,
    Inputs,
    backward,
    flops,
    forward,
    inputs,
    normalise,
    ours,
    raw_inputs,
    transformers,
)
from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops import explain, gated_delta_rule, native

Row = dict[str, Any]
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
REFERENCE_LENGTH = 512
"""How long an input the float64 reference, one token at a time, still runs in a moment."""
WRONG = {"float32": 1e-3, "bfloat16": 2e-2}
"""The relative error (root mean square) from which on an output is wrong and its time means nothing."""
OPERATOR, WITH_L2NORM = "operator", "l2norm + operator"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def checked_error(name: str, actual: Tensor, expected: Tensor, dtype: str) -> float:
    error = relative_error(actual.reshape(expected.shape), expected)
    if not error < WRONG[dtype]:
        raise RuntimeError(f"{name} is wrong: its relative error is {error:.2g} in {dtype}")
    return error


def exact(x: Inputs) -> tuple[Call, Inputs]:
    """The implementation and the inputs that tell what is right."""
    impl = "reference" if x["q"].shape[1] <= REFERENCE_LENGTH else "chunked"
    return ours(impl), {name: tensor.double() for name, tensor in x.items()}


def refusal(x: Inputs, impl: str) -> str | None:
    """Why one of ours does not serve this call, or None where it does."""
    try:
        explain(gated_delta_rule, x["q"], x["k"], x["v"], x["g"], x["beta"], impl=impl)
    except UnsupportedError as error:
        return str(error)
    return None


@cache
def leave_out(line: str) -> None:
    """Say what is left out and why, once."""
    print(f"  left out: {line}")


def our_implementations(x: Inputs, options: argparse.Namespace) -> dict[str, str]:
    """Those of ours that serve this call, the fastest first."""
    found = {}
    for impl in ("cpu", "chunked"):
        name = f"intarsia {impl}"
        if skipped(name, options):
            continue
        if why := refusal(x, impl):
            leave_out(f"{name}: {why}")
        else:
            found[name] = impl
    if not found:
        raise UnsupportedError("none of our implementations is left to compare with")
    return found


def skipped(name: str, options: argparse.Namespace) -> bool:
    return any(word in name for word in options.skip.split(",") if word)


# The peers that are not Python functions of transformers


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


# Our own code in a process of its own, where the environment or the number of threads must differ


@contextmanager
def our_worker(environment: dict[str, str], **task: Any) -> Iterator[tuple[Worker, Tensor]]:
    """A worker for `serve`, and what it returns."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "output")
        command = [sys.executable, __file__, "--serve", json.dumps({**task, "output": str(output)})]
        with Worker(command, {"OMP_NUM_THREADS": str(task["threads"]), **environment}) as worker:
            yield worker, torch.load(output)


def serve(task: dict[str, Any]) -> None:
    """Be the worker: run once, say so, and answer each line with the seconds of a run."""
    torch.set_num_threads(task["threads"])
    x = inputs(task["length"], task["decay"], getattr(torch, task["dtype"]), task["heads"])
    call = ours(task["impl"])
    try:
        torch.save(forward(call, x), task["output"])
    except (ConfigError, UnsupportedError) as error:  # no such instruction set here, or no kernels
        print(error, flush=True)
        return
    print("ready", flush=True)
    timer = stopwatch(forward, call, x)
    for _ in sys.stdin:
        print(timer(), flush=True)


# The sections


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def measure_machine(options: argparse.Namespace) -> list[Row]:
    size, megabytes = (1024, 256) if options.quick else (4096, 2048)
    timers: dict[str, Callable[[], float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        timers[name_of(dtype)] = stopwatch(_product, a, b, torch.empty_like(a))
    memory = torch.zeros(megabytes * 1_000_000 // 4)
    timers["memory"] = stopwatch(memory.add_, 1.0)
    for timer in timers.values():
        timer()
    times = {name: median(values) for name, values in in_turn(timers, options.seconds, least=5).items()}
    return [
        {
            "product": size,
            "bfloat16_gflops_per_second": 2 * size**3 / times["bfloat16"] / 1e9,
            "float32_gflops_per_second": 2 * size**3 / times["float32"] / 1e9,
            "memory_gb_per_second": 2 * megabytes / 1e3 / times["memory"],
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
        }
    ]


def measure_forward(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    for decay, dtype, length in options.cells:
        raw = raw_inputs(length, decay, dtype)
        given = {OPERATOR: normalise(raw), WITH_L2NORM: raw}
        right, wide = exact(raw)
        expected = {
            OPERATOR: forward(*exact(given[OPERATOR])),
            WITH_L2NORM: forward(right, normalise(wide)),
        }
        available = our_implementations(given[OPERATOR], options)
        best = next(iter(available))
        calls: dict[tuple[str, str], Call] = {
            **{(OPERATOR, name): ours(impl) for name, impl in available.items()},
            (OPERATOR, "transformers chunk"): transformers("chunk", decay),
            (OPERATOR, "transformers recurrent"): transformers("recurrent", decay),
            (WITH_L2NORM, best): ours(available[best], normalize=True),
        }
        if options.vllm and decay == "head" and dtype == torch.bfloat16:
            calls[WITH_L2NORM, "vLLM"] = vllm(options.vllm)
        outputs, timers = {}, {}
        for (form, name), call in calls.items():
            if not skipped(name, options):
                outputs[form, name] = forward(call, given[form])
                timers[form, name] = stopwatch(forward, call, given[form])
        with ExitStack() as stack:
            key = OPERATOR, "llama.cpp float32"
            if options.llama and not skipped(key[1], options):
                peer = llama(options.llama, given[OPERATOR], options.threads)
                worker, outputs[key] = stack.enter_context(peer)
                timers[key] = worker.seconds
            errors = {
                (form, name): checked_error(name, output, expected[form], name_of(dtype))
                for (form, name), output in outputs.items()
            }
            times = in_turn(timers, options.seconds, turn=0.1)
        rows: list[Row] = []
        for (form, name), values in times.items():
            gflops = flops(length) / median(values) / 1e9
            computed = "float32" if "float32" in name else name_of(dtype)
            rows.append(
                {
                    "decay": decay,
                    "dtype": name_of(dtype),
                    "T": length,
                    "form": form,
                    "implementation": name,
                    "milliseconds": 1e3 * median(values),
                    "fastest": 1e3 * min(values),
                    "ratio_to_ours": median(values) / median(times[form, best]),
                    "gflops_per_second": gflops,
                    "share_of_product": gflops / rates[f"{computed}_gflops_per_second"],
                    "error": errors[form, name],
                    "runs": len(values),
                }
            )
        yield rows


def measure_backward(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    for decay, dtype, length in options.cells:
        x = inputs(length, decay, dtype)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs(64, decay, dtype).items()}
        available = our_implementations(leaves, options)
        best = next(iter(available))
        expected = backward(*exact(x))[1]
        errors, timers = {}, {}
        for name, impl in available.items():
            call = ours(impl)
            gradients = backward(call, x)[1]
            errors[name] = max(
                checked_error(f"{name}'s gradient of {leaf}", gradients[leaf], expected[leaf], name_of(dtype))
                for leaf in expected
            )
            timers[f"{name}/forward"] = stopwatch(forward, call, x)
            timers[f"{name}/both"] = stopwatch(backward, call, x)
        times = in_turn(timers, options.seconds, turn=0.1)
        yield [
            {
                "decay": decay,
                "dtype": name_of(dtype),
                "T": length,
                "implementation": name,
                "forward_milliseconds": 1e3 * median(times[f"{name}/forward"]),
                "both_milliseconds": 1e3 * median(times[f"{name}/both"]),
                "both_over_forward": median(times[f"{name}/both"]) / median(times[f"{name}/forward"]),
                "ratio_to_ours": median(times[f"{name}/both"]) / median(times[f"{best}/both"]),
                "share_of_product": 3 * flops(length) / median(times[f"{name}/both"]) / 1e9
                / rates[f"{name_of(dtype)}_gflops_per_second"],
                "error": errors[name],
                "runs": len(times[f"{name}/both"]),
            }
            for name in available
        ]  # fmt: skip


def measure_decode(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    """Steps go on from their own states, so a run's time is also the time of reading and writing these."""
    if why := native.missing_reason():
        raise UnsupportedError(why)
    for sequences in (1, 64 if options.quick else 1024):
        for decay in options.decays:
            for dtype in options.dtypes:
                yield _measure_steps(sequences, decay, dtype, options)


def _measure_steps(sequences: int, decay: str, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    x = step_inputs(sequences, decay, dtype)
    best, given = "intarsia step", {form: parts(x, decay, form) for form in FORMS}
    steps: dict[tuple[str, str], Callable[[], Tensor]] = {(f, best): our_step(x, decay, f) for f in FORMS}
    for form in ("rule", "layer") if sequences == 1 else ():
        steps[form, "intarsia operators"] = our_operators(x, decay, form, "cpu")
    if sequences == 1:
        steps["rule", "transformers recurrent"] = transformers_step(x, decay)
    if options.vllm and decay == "head" and dtype == torch.bfloat16:
        steps["gates", "vLLM"] = vllm_step(options.vllm, x)
    steps = {key: step for key, step in steps.items() if not skipped(key[1], options)}
    errors, timers = {}, {}
    with ExitStack() as stack:
        for (form, name), step in steps.items():
            expected = exact_outputs(x, decay, form, 2)
            with torch.inference_mode():  # the second call is from a state that is not zero
                errors[form, name] = max(
                    checked_error(name, step().clone(), right, name_of(dtype)) for right in expected
                )
            timers[form, name] = stopwatch(step)
        key = "rule", "llama.cpp float32"
        if options.llama and sequences == 1 and not skipped(key[1], options):
            worker, output = stack.enter_context(llama(options.llama, given["rule"], options.threads))
            errors[key] = checked_error(key[1], output, exact_outputs(x, decay, "rule", 1)[0], name_of(dtype))
            timers[key] = worker.seconds
        # A state is a board [H, D, D] and, of a layer, the convolution's last three inputs; read once, written once.
        board, past = 4 * HEADS * DIM**2, 4 * 3 * CHANNELS
        traffic = {form: 2 * sequences * (board + past * (form == "layer")) for form in FORMS}
        memory = torch.zeros(sequences * board // 4)
        timers["memory", "torch add_"] = stopwatch(memory.add_, 1.0)
        traffic["memory"] = 2 * memory.nbytes
        with torch.inference_mode():
            times = in_turn(timers, options.seconds, turn=0.1)
    rate = traffic["memory"] / median(times["memory", "torch add_"])
    return [
        {
            "decay": decay,
            "dtype": name_of(dtype),
            "sequences": sequences,
            "form": form,
            "implementation": name,
            "microseconds": 1e6 * median(values),
            "fastest": 1e6 * min(values),
            "ratio_to_ours": median(values) / median(times[form, best]) if (form, best) in times else 1.0,
            "gb_per_second": traffic[form] / median(values) / 1e9,
            "share_of_memory": traffic[form] / median(values) / rate,
            "error": errors.get((form, name), 0.0),
            "runs": len(values),
        }
        for (form, name), values in times.items()
    ]


def measure_instruction_sets(
    options: argparse.Namespace, rates: Row, dtype: torch.dtype
) -> Iterator[list[Row]]:
    """The kernels read the environment when they are loaded, so each set has a process of its own."""
    if why := refusal(inputs(64, options.decays[0], dtype), options.impl):
        raise UnsupportedError(why)
    for decay, _, length in (cell for cell in options.cells if cell[1] == options.dtypes[0]):
        expected = forward(*exact(inputs(length, decay, dtype)))
        with ExitStack() as stack:
            timers, errors = {}, {}
            for name in INSTRUCTION_SETS:
                task = {"decay": decay, "dtype": name_of(dtype), "length": length, "heads": HEADS}
                served = our_worker(
                    {"INTARSIA_CPU_ISA": name}, impl=options.impl, threads=options.threads, **task
                )
                try:
                    worker, output = stack.enter_context(served)
                except UnsupportedError as error:
                    leave_out(f"{name}: {error}")
                    continue
                timers[name] = worker.seconds
                errors[name] = checked_error(name, output, expected, name_of(dtype))
            if not timers:
                raise UnsupportedError("no instruction set is left to compare")
            times = {n: median(v) for n, v in in_turn(timers, options.seconds, turn=0.1).items()}
        yield [
            {
                "decay": decay,
                "dtype": name_of(dtype),
                "T": length,
                "instruction_set": name,
                "milliseconds": 1e3 * seconds,
                "ratio_to_avx512": seconds / times.get("avx512", float("nan")),
                "share_of_product": flops(length) / seconds / 1e9
                / rates[f"{name_of(dtype)}_gflops_per_second"],
                "error": errors[name],
            }
            for name, seconds in times.items()
        ]  # fmt: skip


def measure_float32(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    return measure_instruction_sets(options, rates, torch.float32)


def measure_bfloat16(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    return measure_instruction_sets(options, rates, torch.bfloat16)


def measure_scaling(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    heads, length = 2, 4096 if options.quick else 65536
    for decay in options.decays:
        for dtype in options.dtypes:
            for name, impl in our_implementations(inputs(64, decay, dtype, heads), options).items():
                task = {"decay": decay, "dtype": name_of(dtype), "length": length, "heads": heads}
                timers = {}
                with ExitStack() as stack:
                    for threads in (1, options.threads):
                        worker, _ = stack.enter_context(our_worker({}, impl=impl, threads=threads, **task))
                        timers[threads] = worker.seconds
                    times = in_turn(timers, options.seconds, turn=0.1)
                yield [
                    {
                        "implementation": name,
                        **task,
                        "threads": threads,
                        "milliseconds": 1e3 * median(values),
                        "speedup": median(times[1]) / median(values),
                    }
                    for threads, values in times.items()
                ]


def measure_lengths(options: argparse.Namespace, rates: Row) -> Iterator[list[Row]]:
    heads, dtype = 2, options.dtypes[0]
    lengths = [1 << n for n in range(9, 14 if options.quick else 21, 2)]
    if not options.quick:
        lengths.append(1 << 20)
    for decay in options.decays:
        available = our_implementations(inputs(64, decay, dtype, heads), options)
        shortest: dict[str, float] = {}
        peak_per_token = 0.0
        for length in lengths:
            if 1.25 * peak_per_token * length > available_memory():
                leave_out(f"T = {length} and longer, {decay}: not enough memory")
                break
            x: Inputs = {}
            peak = peak_memory(partial(_first_calls, x, length, decay, dtype, heads, available.values()))
            peak_per_token = peak / length
            timers = {name: stopwatch(forward, ours(impl), x) for name, impl in available.items()}
            times = {n: median(v) for n, v in in_turn(timers, options.seconds, turn=0.1).items()}
            for name, seconds in times.items():
                shortest[name] = min(seconds / length, shortest.get(name, seconds / length))
            yield [
                {
                    "implementation": name,
                    "decay": decay,
                    "dtype": name_of(dtype),
                    "heads": heads,
                    "T": length,
                    "milliseconds": 1e3 * seconds,
                    "microseconds_per_token": 1e6 * seconds / length,
                    "ratio_to_best_so_far": seconds / length / shortest[name],
                }
                for name, seconds in times.items()
            ]


def _first_calls(
    x: Inputs, length: int, decay: str, dtype: torch.dtype, heads: int, impls: Iterable[str]
) -> None:
    """Put the inputs into `x` and call each implementation once."""
    x.update(inputs(length, decay, dtype, heads))
    for impl in impls:
        forward(ours(impl), x)


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


if __name__ == "__main__":
    main()
