"""The kernels of each instruction set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from checks import Row, checked_error, exact, leave_out, name_of, refusal
from served import our_worker

from common import in_turn, median
from delta_rule import HEADS, flops, forward, inputs
from intarsia.errors import UnsupportedError

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


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
