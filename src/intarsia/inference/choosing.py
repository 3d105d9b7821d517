"""The next tokens of texts, of those that their constraints allow, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.inference.requests import Logprobs, Text
from intarsia.inference.sampling import choose_each


def choose(places: Sequence[tuple[Text, Tensor]]) -> list[int | IntarsiaError]:
    """The next token of each of several texts, by the logits behind it, `[vocab]`; the error in its place where its
    constraint or the logits say none."""
    rows = [_allowed(text, logits) for text, logits in places]
    stacked = torch.stack(
        [
            logits if isinstance(row, IntarsiaError) else row
            for row, (_, logits) in zip(rows, places, strict=True)
        ]
    )
    chosen = choose_each(stacked, [text.sampler for text, _ in places])
    return [row if isinstance(row, IntarsiaError) else token for row, token in zip(rows, chosen, strict=True)]


def _allowed(text: Text, logits: Tensor) -> Tensor | IntarsiaError:
    """The logits of those tokens that a text may go on with."""
    if text.constraint is None:
        return logits
    try:
        return logits.masked_fill(~text.constraint.allowed(), float("-inf"))
    except IntarsiaError as error:
        return error


def logprobs_of(count: int | None, token: int, logits: Tensor) -> Logprobs | None:
    if count is None:
        return None
    found = torch.log_softmax(logits.double(), dim=-1)
    top = found.topk(min(count, found.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Logprobs(float(found[token]), tuple(pairs))
