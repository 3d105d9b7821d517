"""Compiled blocks: the same numbers, and few graphs, however many blocks, tokens and packed sequences there are."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from intarsia.ops import Sequences
from support.device import device

T = 96
COUNTS = (3, 4, 5, 7, 8, 6, 5, 3)
"""Numbers of packed sequences: those of two powers of two."""


class Counting:
    """A backend of torch.compile that compiles nothing and counts: graphs, and the nodes of each."""

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.nodes.append(len(module.graph.nodes))
        return module.forward


def packed(count: int, generator: torch.Generator) -> Sequences:
    cuts = (torch.randperm(T - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
    edges = [0, *cuts, T]
    return Sequences(tuple(b - a for a, b in pairwise(edges)))


def step(model, tokens, targets, seqs):
    model.zero_grad()
    out = model(tokens, targets=targets, seqs=seqs, side=("load", "largest_logits"))
    out.nll.mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients, [value for told in out.side for value in told if value is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_graphs_are_few_and_right(make_model, recompute: bool) -> None:
    plain = make_model(depth=6, layout="kda kda mla").float()  # the first layer without experts
    model = copy.deepcopy(plain)
    model.activation_checkpointing = recompute
    torch._dynamo.reset()
    backend = Counting()
    model.compile_blocks(backend)
    generator = torch.Generator().manual_seed(0)
    for count in COUNTS:
        rows = torch.randint(0, plain.config.vocab_size, (1, T + 1), generator=generator).to(device())
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), packed(count, generator)
        (expected, told), (got, also_told) = step(plain, *batch), step(model, *batch)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
        for value, other in zip(told, also_told, strict=True):
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5)
    # Six blocks of three kinds, and two powers of two.
    assert len(backend.nodes) == 3 * 2
    # More sequences are a few more arguments, not more work: nothing is unrolled.
    few, many = sum(backend.nodes[:3]), sum(backend.nodes[3:])
    assert many - few <= 3 * 6 * (8 - 4)
    with torch.no_grad():  # evaluation is not compiled
        model(*batch[:1], seqs=packed(17, generator))
        model(batch[0], states=model.init_states(1))
    assert len(backend.nodes) == 3 * 2


def test_deeper_models_have_no_more_graphs(make_model) -> None:
    counts = []
    for depth in (2, 8):
        model = make_model(depth=depth, layout="kda mla", experts=None)
        torch._dynamo.reset()
        backend = Counting()
        model.compile_blocks(backend)
        tokens = torch.randint(0, model.config.vocab_size, (2, 40), device=device())
        model(tokens, targets=tokens).nll.mean().backward()
        counts.append(len(backend.nodes))
    assert counts == [2, 2]
