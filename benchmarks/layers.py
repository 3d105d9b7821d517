"""The short convolution and the gated RMSNorm beside our PyTorch form and PyTorch's own operators, in one run.

    python benchmarks/layers.py [--lengths 1,512,4096] [--dtypes float32,bfloat16] [--threads 2] [--out FILE.json]

`conv` is the convolution of q, k and v of a layer with 8 heads of 128 (3072 channels, 4 weights each) with SiLU; `norm`
the gated norm (sigmoid) of its output. With a length of 1 the convolution continues from a state, as decoding does.
The implementations run in turn, so that a slow phase of the machine meets all of them; medians are compared, and the
outputs before anything is timed. "GB/s" counts each input and each output of ours once; the first line is what
copying a tensor reaches in the same run. On a machine with other load, two threads wait for each other: take one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.ops import gated_rms_norm, native, short_convolution

HEADS, DIM, TAPS = 8, 128, 4
Row = dict[str, Any]
Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]


def conv_inputs(length: int, dtype: torch.dtype) -> Inputs:
    """x and weight; for one token the state before it, too."""
    channels = 3 * HEADS * DIM
    x = {
        "x": torch.randn(1, length, channels, dtype=dtype),
        "weight": torch.randn(channels, TAPS, dtype=dtype),
    }
    return {**x, "initial_state": torch.randn(1, TAPS - 1, channels)} if length == 1 else x


def our_conv(impl: str, *, x: Tensor, weight: Tensor, initial_state: Tensor | None = None) -> Tensor:
    return short_convolution(
        x, weight, activation="silu", initial_state=initial_state, output_final_state=initial_state is not None,
        impl=impl,
    )[0]  # fmt: skip


def torch_conv(*, x: Tensor, weight: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """By `F.conv1d`, as published models have it: the channels before the tokens."""
    row = (
        F.pad(x.mT, (TAPS - 1, 0))
        if initial_state is None
        else torch.cat([initial_state.mT.to(x.dtype), x.mT], -1)
    )
    y = F.silu(F.conv1d(row, weight[:, None], groups=x.shape[2])).mT
    if initial_state is not None:
        initial_state.copy_(row[..., x.shape[1] :].mT)
    return y


def norm_inputs(length: int, dtype: torch.dtype) -> Inputs:
    o, z = (torch.randn(1, length, HEADS, DIM, dtype=dtype) for _ in range(2))
    return {"o": o, "weight": torch.ones(DIM), "z": z}


def our_norm(impl: str, *, o: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return gated_rms_norm(o, z, weight, eps=1e-5, impl=impl)


def torch_norm(*, o: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    """By `F.rms_norm`, in float32."""
    return (F.rms_norm(o.float(), weight.shape, weight, 1e-5) * torch.sigmoid(z.float())).to(o.dtype)


OPERATORS: dict[str, tuple[Callable[[int, torch.dtype], Inputs], Call, Call]] = {
    "conv": (conv_inputs, our_conv, torch_conv),
    "norm": (norm_inputs, our_norm, torch_norm),
}


def backward(y: Tensor, leaves: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(y, leaves, gradient, retain_graph=True)


def nbytes(tensors: Inputs) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def measure(operator: str, length: int, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    make, ours, theirs = OPERATORS[operator]
    x = make(length, dtype)
    calls: dict[str, Call] = {"torch": partial(ours, "torch"), "torch's own": theirs}
    if not native.missing_reason():
        calls = {"cpu": partial(ours, "cpu"), **calls}
    with torch.no_grad():
        outputs = {name: call(**{n: t.clone() for n, t in x.items()}) for name, call in calls.items()}
        for name, y in outputs.items():
            torch.testing.assert_close(y, outputs["torch"], rtol=0.05, atol=0.1, msg=name)
        times = in_turn(
            {name: stopwatch(partial(call, **x)) for name, call in calls.items()}, seconds, turn=seconds / 20
        )
    y = outputs["torch"]
    what = "step" if length == 1 and operator == "conv" else "forward"
    state = x["initial_state"].numel() * 4 if "initial_state" in x else 0
    yield {"what": what, **rates(times, nbytes(x) + y.numel() * y.element_size() + state)}
    if length == 1:
        return
    graphs: dict[str, Callable[[], float]] = {}
    gradient = torch.randn_like(y)
    for name, call in calls.items():
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        graphs[name] = stopwatch(partial(backward, call(**leaves), list(leaves.values()), gradient))
    times = in_turn(graphs, seconds, turn=seconds / 20)
    yield {"what": "backward", **rates(times, 2 * nbytes(x) + y.numel() * y.element_size())}


def rates(times: dict[str, list[float]], moved: int) -> Row:
    """Medians in microseconds, what the first implementation moves a second, and the others as multiples of it."""
    medians = {name: median(values) for name, values in times.items()}
    first = next(iter(medians))
    row: Row = {f"{name} us": value * 1e6 for name, value in medians.items()}
    row["GB/s"] = moved / medians[first] / 1e9
    return {
        **row,
        **{f"{name} x": value / medians[first] for name, value in medians.items() if name != first},
    }


def copying(seconds: float) -> float:
    """What copying 64 MiB from one tensor into another reads and writes, GB/s."""
    a = torch.randn(16 << 20)
    b = torch.empty_like(a)
    times = in_turn({"copy": stopwatch(b.copy_, a)}, seconds)["copy"]
    return 2 * a.numel() * a.element_size() / median(times) / 1e9


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--lengths", default="1,512,4096")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copied = copying(options.seconds)
    print(f"copying: {copied:.1f} GB/s, {options.threads} threads\n")
    rows: list[Row] = []
    for operator in OPERATORS:
        for dtype in options.dtypes.split(","):
            for length in map(int, options.lengths.split(",")):
                for row in measure(operator, length, getattr(torch, dtype), options.seconds):
                    rows.append({"operator": operator, "dtype": dtype, "T": length, **row})
                    table(rows[-1:], header=len(rows) == 1)
    if options.out:
        write_results(options.out, {"machine": machine(), "copy_gb_per_s": copied, "rows": rows})


if __name__ == "__main__":
    main()
