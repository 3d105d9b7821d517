"""Products with few rows: how much of the memory's speed they reach, and how PyTorch's own products do beside them.

    python benchmarks/products.py [--rows 1,4,16,64,256] [--formats bfloat16,int8,int4] [--threads 2] [--out FILE.json]

A decoded token multiplies one row with every weight, so a product with one row can be no faster than reading the
weights. How fast memory can be read is measured here by a plain sum over a buffer larger than the caches; the matrices
together are larger too, and each is used once a round. Peers: `torch.nn.functional.linear` for floating-point weights,
`torch._weight_int8pack_mm` and `torch._weight_int4pack_mm_for_cpu` (which torchao calls on CPUs) for integers. All
run in turn, so that a slow phase of the machine meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.ops import native, pack_weights, packed_linear
from intarsia.ops.packed_weights import WeightFormat

N = K = 4096
GROUP = 64
BYTES = 256 << 20
"""Of the matrices of a format together: several times the caches."""

Run = Callable[[Tensor], Any]


def ours(format: WeightFormat) -> tuple[Run, int, int]:
    """A round of products, how many there are, and the bytes that they read."""
    one = pack_weights(torch.randn(N, K), format)
    count = max(1, BYTES // one.nbytes)
    matrices = [pack_weights(torch.randn(N, K), format) for _ in range(count)]

    def run(x: Tensor) -> None:
        for matrix in matrices:
            packed_linear(x, matrix, impl="cpu")

    return run, count, count * one.nbytes


def torchs(format: WeightFormat, count: int) -> Run:
    """The same by PyTorch."""
    if format in ("float32", "bfloat16"):
        weights = [torch.randn(N, K, dtype=getattr(torch, format)) for _ in range(count)]
        return lambda x: [F.linear(x, w) for w in weights]
    if format == "int8":
        int8 = [torch.randint(-127, 128, (N, K), dtype=torch.int8) for _ in range(count)]
        scales = torch.rand(N, dtype=torch.bfloat16)
        return lambda x: [torch._weight_int8pack_mm(x, w, scales) for w in int8]
    q = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    int4 = [packed.clone() for _ in range(count)]
    scales_and_zeros = torch.rand(K // GROUP, N, 2, dtype=torch.bfloat16)
    return lambda x: [torch._weight_int4pack_mm_for_cpu(x, w, GROUP, scales_and_zeros) for w in int4]


def measure(
    format: WeightFormat, rows: list[int], seconds: float, bandwidth: Callable[[], float]
) -> list[dict[str, Any]]:
    run, count, read = ours(format)
    peer = torchs(format, count)
    found = []
    for R in rows:
        x = torch.randn(R, K, dtype=torch.float32 if format == "float32" else torch.bfloat16)
        times = in_turn({"intarsia": stopwatch(run, x), "torch": stopwatch(peer, x)}, seconds)
        peak = bandwidth()
        for name, values in times.items():
            took = median(values) / count
            found.append(
                {
                    "format": format,
                    "rows": R,
                    "implementation": name,
                    "milliseconds": 1e3 * took,
                    "GB/s": read / count / took / 1e9,
                    "share_of_bandwidth": read / count / took / peak,
                    "ratio_to_torch": median(values) / median(times["torch"]),
                    "runs": len(values),
                }
            )
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--formats", default="bfloat16,float32,int8,int4")
    parser.add_argument("--seconds", type=float, default=2, help="for each comparison")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    native.native()
    buffer = torch.ones(BYTES // 4)

    def bandwidth() -> float:
        times = in_turn({"sum": stopwatch(buffer.sum)}, 0.3)["sum"]
        return buffer.nbytes / median(times)

    results = []
    for format in options.formats.split(","):
        results += measure(format, [int(r) for r in options.rows.split(",")], options.seconds, bandwidth)
    table(results)
    if options.out:
        write_results(options.out, {"machine": machine(), "N": N, "K": K, "group": GROUP, "results": results})


if __name__ == "__main__":
    with torch.no_grad():
        main()
