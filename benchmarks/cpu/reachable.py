"""What the machine can do: products of matrices in oneDNN, reading and writing memory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from checks import Row, name_of
from torch import Tensor

from common import in_turn, median, stopwatch


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
