"""Small models in transformers' seat, and batches with padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.integrations.huggingface import IntarsiaForCausalLM
from support.small_models import MIXERS, build

PAD = 5  # a token like any other: what is padding, the mask says
HYBRID = "gdn kda attention mla-rotated window mamba2 lightning"
# A layer of one's own can be in a configuration on disk when its name has been registered.
SEATED = [*(name for name in MIXERS if "tutorial" not in name), HYBRID]


def seat(layout: str, seed: int = 0, **options: Any) -> IntarsiaForCausalLM:
    """A model of this layout in float64."""
    names = {name.split("*")[0] for name in layout.split()}
    model = build(layout, seed, mixers={name: MIXERS[name] for name in names})
    return IntarsiaForCausalLM.of(model.double(), **options)


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as a batch, `[B, T]`, and its mask."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.int64)
    for n, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    return ids, mask
