"""What a layer tells beside its output: declared by the layer, asked for by name, and returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SideName = Literal["largest_logits", "load", "loss", "divergence", "picked"]


class SideResults(NamedTuple):
    """The side results of one layer and one forward pass; None for what was not asked for, or what the layer has not.

    They are returned, never kept in a module: a forward pass that is computed again (activation checkpointing) counts
    nothing twice, and compiled graphs, FSDP's hooks and threads see values like any others. A tuple, so that they find
    the tensors in it.

    A layer lists in `side_results` which of them it has. Who asks for some by `side`, the tuple of their names, gets
    them as one more result.
    """

    largest_logits: Tensor | None = None
    """`[H]` float32, of softmax attention: the largest logit of each head, for QK-clip."""
    load: Tensor | None = None
    """`[E]` float32, of experts: how many tokens each of them served, of those that count."""
    loss: Tensor | None = None
    """`[]`: summed over the tokens that count, like their negative log-likelihoods, to which training adds it."""
    divergence: Tensor | None = None
    """`[]`, of an indexer: how far from attention its scores are, in nats, summed over tokens.
    Its loss is a multiple."""
    picked: Tensor | None = None
    """`[B, T]`, of an indexer: which share of what full attention would give each token stands in what it picks; NaN
    for tokens that have no more to see, None where none has."""

    def merged(self, other: SideResults) -> SideResults:
        """Those of two forward passes of the layer together."""
        return SideResults(
            _both(self.largest_logits, other.largest_logits, torch.maximum),
            _both(self.load, other.load, torch.add),
            _both(self.loss, other.loss, torch.add),
            _both(self.divergence, other.divergence, torch.add),
            _both(self.picked, other.picked, lambda a, b: torch.cat([a, b], dim=1)),
        )

    def beside(self, other: SideResults) -> SideResults:
        """Those of two parts of one layer, which have different ones."""
        return SideResults(*(b if a is None else a for a, b in zip(self, other, strict=True)))

    def detached(self) -> SideResults:
        """The numbers alone, without what computed them."""
        return SideResults(*(None if x is None else x.detach() for x in self))


def _both(a: Tensor | None, b: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return a if b is None else b if a is None else combine(a, b)
