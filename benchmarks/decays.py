"""Whether strong decays cost time: KDA's kernels with decays as they are after initialisation, and many times that.

    python benchmarks/decays.py [--length 1024] [--seconds 4] [--out FILE.json]

Strong decays multiply to numbers that a processor holds with fewer digits than others (below 1.2e-38), and some
processors take a hundred cycles for each. Training with a high rate makes such decays. All strengths run in turn, and
medians are told in terms of the weakest; without such a cost each is 1.
"""

from __future__ import annotations

from typing import Any

import torch

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from delta_rule import Call, Inputs, backward, forward, inputs, ours
from intarsia.ops import native

STRENGTHS = (1, 4, 16, 64, 256)


def measure(impl: str, with_backward: bool, length: int, seconds: float) -> list[dict[str, Any]]:
    call: Call = ours(impl)
    run = backward if with_backward else forward
    x = inputs(length, "channel", torch.float32)
    cases: dict[int, Inputs] = {strength: {**x, "g": x["g"] * strength} for strength in STRENGTHS}
    for case in cases.values():
        run(call, case)
    times = in_turn({s: stopwatch(run, call, case) for s, case in cases.items()}, seconds)
    least = median(times[STRENGTHS[0]])
    return [
        {
            "impl": impl, "pass": "with backward" if with_backward else "forward", "decays": strength,
            "mean_log_decay": float(cases[strength]["g"].mean()),
            "ms": 1e3 * median(times[strength]), "in_terms_of_the_weakest": median(times[strength]) / least,
        }
        for strength in STRENGTHS
    ]  # fmt: skip


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each of the four tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for impl in ["chunked"] if native.missing_reason() else ["cpu", "chunked"]:
        for with_backward in (False, True):
            found = measure(impl, with_backward, options.length, options.seconds)
            table(found, header=not rows)
            rows += found
    if options.out:
        write_results(options.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
