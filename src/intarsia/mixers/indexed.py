"""Sparse attention whose indexer has parameters, and what these are trained by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.layers.side import SideName, SideResults
from intarsia.mixers.sparse import Asked, SparseAttention, SparseAttentionConfig
from intarsia.ops import picked_share

I = TypeVar("I")  # noqa: E741
TOLD: tuple[SideName, ...] = ("loss", "divergence", "picked")
"""The side results of a layer whose indexer learns."""


@dataclass(frozen=True)
class IndexedConfig(SparseAttentionConfig):
    """The options of grouped attention, and how its indexer learns.

    Training adds `index_loss` times its loss: how far its scores are from what attention gives the tokens that it
    picked, summed over tokens. It reaches nothing but the indexer; 0 leaves the indexer as it is.

    `dense` lets attention read everything, as before it was sparse, and the indexer learn from all of it: the stage
    that an indexer begins with, all else frozen.
    """

    index_loss: float = field(default=0.01, kw_only=True)
    dense: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index_loss(self.index_loss)


def check_index_loss(value: float) -> None:
    """Raise ConfigError unless it can be what a loss counts."""
    if not value >= 0:
        raise ConfigError(f"index_loss is what a loss counts, at least 0; got {value}")


class IndexedAttention(SparseAttention, Generic[I]):
    """`SparseAttention` that picks by what an `indexer` makes of tokens. No gradient comes through the choice: the
    model's loss does not reach the indexer, which is trained by the side result `loss`.
    """

    config: IndexedConfig
    untrained: ClassVar[tuple[str, ...]] = ("indexer",)

    def __init__(self, d_model: int, config: IndexedConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        if config.index_loss:
            self.side_results = (*self.side_results, *TOLD)

    def index(self, asked: Asked) -> I:
        """What the indexer makes of the tokens; what is to be remembered of it is."""
        raise NotImplementedError

    def pick(self, index: I, asked: Asked) -> Tensor | None:
        """What each token reads, as `sparse_attention` takes it; None: everything."""
        raise NotImplementedError

    def divergence(self, index: I, asked: Asked, picked: Tensor | None) -> Tensor:
        """`[B, T]`: how far the indexer's scores are from attention, over what was picked, or None, over everything."""
        raise NotImplementedError

    def choose(self, asked: Asked) -> Tensor | None:
        return self.chosen(asked, ())[0]

    def chosen(self, asked: Asked, side: tuple[SideName, ...]) -> tuple[Tensor | None, SideResults]:
        c, index = self.config, self.index(asked)
        best = self.pick(index, asked) if "picked" in side or not c.dense else None
        picked = None if c.dense else best
        told = told_of_index(
            side,
            c.index_loss,
            asked.past.grown is None,
            lambda: self.divergence(index, asked, picked),
            None if best is None else lambda: self._shares(asked, best),
        )
        return picked, told

    def _shares(self, asked: Asked, picked: Tensor) -> tuple[Tensor, Tensor]:
        return picked_share(
            asked.q,
            asked.k,
            picked,
            block=self.block,
            scale=self.config.logit_scale,
            cu_seqlens=asked.past.seqs,
        )


def told_of_index(
    side: tuple[SideName, ...],
    counts: float,
    whole: bool,
    divergence: Callable[[], Tensor],
    shares: Callable[[], tuple[Tensor, Tensor]] | None,
) -> SideResults:
    """The side results of an indexer.

    Args:
        counts: what its loss counts.
        whole: whether it looks at whole sequences, without a state.
        divergence: of each token, `[B, T]`.
        shares: as `picked_share` has them; None where everything is picked.

    Raises:
        UnsupportedError: a loss is wanted of pieces of sequences.
    """
    wanted: dict[str, Any] = {}
    if set(side) & set(TOLD) and not whole:
        raise UnsupportedError("an indexer is trained on whole sequences: its loss is there without a state")
    if "loss" in side or "divergence" in side:
        total = divergence().sum()
        wanted = {"loss": counts * total, "divergence": total.detach()}
    if "picked" in side and shares is not None:
        share, chosen = shares()
        wanted["picked"] = share.masked_fill(~chosen, torch.nan)
    return SideResults(**{name: x for name, x in wanted.items() if name in side})
