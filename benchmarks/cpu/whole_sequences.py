"""The rule over whole sequences: forward beside every peer, forward and backward together."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from checks import Row, checked_error, exact, name_of, our_implementations, skipped
from others import llama, vllm

from common import in_turn, median, stopwatch
from delta_rule import Call, backward, flops, forward, inputs, normalise, ours, raw_inputs, transformers

OPERATOR, WITH_L2NORM = "operator", "l2norm + operator"


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
