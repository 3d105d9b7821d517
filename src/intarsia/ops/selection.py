"""The selector of sparse attention: which of the entries that a query may choose are the best."""

from __future__ import annotations

import torch
from torch import Tensor


def first_best(scores: Tensor, count: int, visible: Tensor) -> Tensor:
    """The `count` best of the first `visible` entries of each row; of equal ones the earlier.

    What is chosen of a row depends on its visible scores alone, to the bit. A score that is not a number counts as the
    best: whoever made it so is to be seen.

    Args:
        scores: `[..., N]`.
        visible: `[...]`, integers: how many of a row's entries, from the first on, may be chosen.

    Returns:
        `[..., min(count, N)]` int32, the numbers of the chosen, rising, with -1 behind them where there are fewer.
    """
    N = scores.shape[-1]
    count = min(count, N)
    number = torch.arange(N, device=scores.device, dtype=torch.int32)
    shown = number < visible[..., None]
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(~shown, -torch.inf)
    last = scores.topk(count, dim=-1).values[..., -1:]
    better, equal = scores > last, (scores == last) & shown
    room = count - better.sum(-1, keepdim=True)
    chosen = better | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    # The numbers themselves are all different, so this has no ties.
    found = number.where(chosen, N).topk(count, dim=-1, largest=False, sorted=True).values
    return found.masked_fill(found == N, -1)


def rising(numbers: Tensor) -> Tensor:
    """The numbers of each row in order, with what is -1 behind them."""
    largest = torch.iinfo(numbers.dtype).max
    found = numbers.masked_fill(numbers < 0, largest).sort(dim=-1).values
    return found.masked_fill(found == largest, -1)


def with_tail(chosen: Tensor, tokens: Tensor, block: int) -> Tensor:
    """Chosen blocks with the one that is not complete yet, if a query stands in one.

    Args:
        chosen: `[..., n]` as of `first_best`, complete blocks.
        tokens: `[...]`, how many tokens each query sees.

    Returns:
        `[..., n + 1]`, int32, rising, with -1 behind.
    """
    own = (tokens // block).masked_fill(tokens % block == 0, -1).to(torch.int32)
    return rising(torch.cat([chosen, own[..., None]], dim=-1))
