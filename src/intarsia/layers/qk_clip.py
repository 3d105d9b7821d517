"""What softmax mixers do for QK-clip (MuonClip, Kimi K2 report, arXiv:2507.20534)."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.layers.float32 import KeepsFloat32


class ClipsLogits(KeepsFloat32):
    """The bookkeeping of QK-clip.

    With `record_max_logit` the forward passes of training keep the largest attention logit of each head in
    `max_logit` `[H]`; `qk_clip_` then scales the weights of the heads that went beyond a threshold.
    """

    float32_names = ("max_logit",)
    record_max_logit: bool = False
    max_logit: Tensor

    def init_own_buffers(self) -> None:
        """Nothing seen."""
        self.max_logit.fill_(-torch.inf)

    def record(self, logits: Tensor) -> None:
        """Keep the largest of what was seen and `logits` `[H]`."""
        torch.maximum(self.max_logit, logits.to(self.max_logit.dtype), out=self.max_logit)

    @torch.no_grad()
    def qk_clip_(self, threshold: float) -> int:
        """Scale queries and keys of the heads whose largest logit exceeds `threshold` so that it would have
        been `threshold`; forget the record; return how many heads were scaled."""
        exceeded = self.max_logit > threshold
        count = int(exceeded.sum())
        if count:
            factor = torch.where(exceeded, threshold / self.max_logit, torch.ones_like(self.max_logit))
            self.scale_heads_(factor)
        self.max_logit.fill_(-torch.inf)
        return count

    def scale_heads_(self, factor: Tensor) -> None:
        """Multiply the logits of each head by `factor` `[H]` through the weights."""
        raise NotImplementedError
