"""How the time grows: with the length of the sequence, and how it falls with threads."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from checks import Row, leave_out, name_of, our_implementations
from served import our_worker

from common import available_memory, in_turn, median, peak_memory, stopwatch
from delta_rule import Inputs, forward, inputs, ours


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
