"""torch.compile makes whole graphs of every mixer, and one for all lengths after the one for the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.ops import Sequences
from support.graphs import LENGTHS, graphs
from support.mixer_cases import CASES, D_MODEL, build

QUICK = {"kda", "mla", "fox", "qsa"}
"""One of each way to compute; the others take minutes."""
WITH_GRADIENTS = {
    "kda",
    "mla",
    "fox",
    "mamba2",
    "comba",
    "window with sinks and biases",
    "deltaformer",
    "path",
    "simplicial",
}
CASE = [
    pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in CASES
    if "tutorial" not in case  # run from its file, it is in no module that dynamo could look into
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASE)
def test_graphs_of_all_lengths(case: str, packed: bool) -> None:
    mixer = build(case, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def run(x: Tensor, seqs: Sequences | None) -> Tensor:
        return mixer(x, None, seqs)[0]

    calls = [
        (
            torch.randn(1 if packed else 2, T, D_MODEL, generator=generator).requires_grad_(),
            Sequences((T // 3, T // 2, T - T // 2 - T // 3)) if packed else None,
        )
        for T in LENGTHS
    ]
    # Sequences that are shorter than a window, or have no more than is picked, take another way, and so may each of
    # three that are packed.
    short = any(name in case for name in ("window", "moba", "infllm2", "nsa"))
    most = 2 if not short else 5 if packed else 3
    assert graphs(run, calls, backward=case in WITH_GRADIENTS) <= most
