"""The step of one token, of one sequence and of many, whose states fill the memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from checks import Row, checked_error, name_of, skipped
from others import llama
from torch import Tensor

from common import in_turn, median, stopwatch
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
from delta_rule import DIM, HEADS
from intarsia.errors import UnsupportedError
from intarsia.ops import native


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
