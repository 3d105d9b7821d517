"""What softmax mixers have for QK-clip (MuonClip, Kimi K2 report, arXiv:2507.20534)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from intarsia.layers.norm import RMSNorm
from intarsia.layers.side import SideName


class RowScale(NamedTuple):
    """How a weight makes logits smaller: its rows (along the first dimension) times `factor`, `[rows]`."""

    parameter: Tensor
    factor: Tensor
    zero: float = 0.0
    """What the rows are scaled towards: 0, or -1 where one more than the parameter is the weight."""


class ClipsLogits(nn.Module):
    """A mixer whose attention logits can be kept from growing: it has them as a side result, and says how weights scale
    them."""

    side_results: tuple[SideName, ...] = ("largest_logits",)

    def logit_scales(self, factor: Tensor) -> Iterator[RowScale]:
        """What multiplies the logits of each head by `factor` `[H]`, in (0, 1]."""
        raise NotImplementedError


def row_scales(module: nn.Linear | RMSNorm, factor: Tensor) -> Iterator[RowScale]:
    """What multiplies the output channels of a projection or a norm by `factor`, one each."""
    if isinstance(module, RMSNorm):
        yield RowScale(module.weight, factor, -1.0 if module.zero_centered else 0.0)
        return
    yield RowScale(module.weight, factor)
    if module.bias is not None:
        yield RowScale(module.bias, factor)
