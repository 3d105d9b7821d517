"""Sliding-window attention (Beltagy et al. 2020, arXiv:2004.05150; Mistral 7B, arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from intarsia.mixers.attention import Attention, AttentionConfig
from intarsia.mixers.base import About, positive


@dataclass(frozen=True)
class SlidingWindowConfig(AttentionConfig):
    """The options of softmax attention, and `window`: token i sees the tokens j with `i - window < j <= i`, so that
    it is one of the `window` tokens itself (as in transformers; Mistral's report counts one more)."""

    type: ClassVar[str] = "window"
    about = About(
        title="Sliding-window attention",
        year=2020,
        source="arXiv:2004.05150",
        family="softmax",
        equation="o_t = softmax(q_t K_{t-w+1..t}^T / sqrt(K)) V_{t-w+1..t}",
        brought="each token looks at the last few alone: time and memory no longer grow with the length",
        operator="softmax_attention",
        example={"num_heads": 8, "head_dim": 128, "window": 512},
    )
    window: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(window=self.window)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> SlidingWindowAttention:
        return SlidingWindowAttention(d_model, self, norm_eps)


class SlidingWindowAttention(Attention):
    """`Attention` to the last `window` tokens, of which alone it keeps the keys and values."""

    window: int

    def __init__(self, d_model: int, config: SlidingWindowConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.window = config.window
