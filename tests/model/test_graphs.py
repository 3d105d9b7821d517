"""torch.compile makes one graph of a whole model and its loss for all lengths, after the one for the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.ops import Sequences
from support.graphs import LENGTHS, graphs


@pytest.mark.parametrize("packed", [False, True])
def test_graphs_of_all_lengths(make_model, packed: bool) -> None:
    model = make_model().float()
    generator = torch.Generator().manual_seed(0)

    def run(tokens: Tensor, targets: Tensor, seqs: Sequences | None) -> Tensor:
        return model(tokens, targets=targets, seqs=seqs).nll

    calls = []
    for T in LENGTHS:
        rows = torch.randint(0, 11, (1 if packed else 2, T + 1), generator=generator)
        seqs = Sequences((T // 3, T // 2, T - T // 2 - T // 3)) if packed else None
        calls.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), seqs))
    assert graphs(run, calls) <= 3
