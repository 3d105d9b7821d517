"""Softmax attention and Mamba-2 side by side in one layer (Falcon-H1, Zuo et al. 2025, arXiv:2507.22448)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from intarsia.layers.joint import JointMemory, JointState
from intarsia.mixers.attention import AttentionConfig
from intarsia.mixers.base import About, Layer, Mixer, MixerConfig, positive
from intarsia.mixers.mamba2 import Mamba2Config
from intarsia.ops import Sequences


@dataclass(frozen=True)
class ParallelConfig(MixerConfig):
    """The options of both, and the factors of what attention is given (`attention_in`) and of what either gives
    (`attention_out`, `mamba2_out`)."""

    type: ClassVar[str] = "parallel"
    about = About(
        title="Attention and Mamba-2 in parallel",
        year=2025,
        source="arXiv:2507.22448",
        family="softmax",
        equation="y_t = a softmax_attention(b x)_t + c mamba2(x)_t",
        brought="both kinds of memory in every layer, in any proportion of heads",
        operator="softmax_attention",
        example={
            "attention": {"num_heads": 4, "head_dim": 128},
            "mamba2": {"num_heads": 16, "head_dim": 64, "state_dim": 128},
        },
    )
    attention: AttentionConfig
    mamba2: Mamba2Config
    attention_in: float = 1.0
    attention_out: float = 1.0
    mamba2_out: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(attention_in=self.attention_in, attention_out=self.attention_out, mamba2_out=self.mamba2_out)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Parallel:
        return Parallel(d_model, self, norm_eps)


class Parallel(Mixer[JointState]):
    """`y = attention_out attention(attention_in x) + mamba2_out mamba2(x)`, of a layer's normed input x.

    Left out: largest logits for QK-clip, which ask for softmax attention alone.
    """

    residual_outputs = ()  # those of both

    def __init__(self, d_model: int, config: ParallelConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        self.attention = config.attention.build(d_model, norm_eps)
        self.mamba2 = config.mamba2.build(d_model, norm_eps)

    def forward(
        self, x: Tensor, state: JointState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, JointState | None]:
        self.check_input(x, state, seqs)
        return self.together(self.attention, self.mamba2, x, state, seqs)

    def together(
        self,
        attention: Layer[Any],
        mamba2: Layer[Any],
        x: Tensor,
        state: JointState | None,
        seqs: Sequences | None,
    ) -> tuple[Tensor, JointState | None]:
        """`forward`, with what computes both."""
        c = self.config
        seen, remembered = (None, None) if state is None else state.parts
        attended, seen = attention(_times(c.attention_in, x), seen, seqs)
        mixed, remembered = mamba2(x, remembered, seqs)
        y = _times(c.attention_out, attended) + _times(c.mamba2_out, mixed)
        return y, None if seen is None or remembered is None else JointState((seen, remembered))

    def for_inference(self) -> Layer[JointState]:
        attention, mamba2 = self.attention.for_inference(), self.mamba2.for_inference()

        def ready(
            x: Tensor, state: JointState | None = None, seqs: Sequences | None = None
        ) -> tuple[Tensor, JointState | None]:
            return self.together(attention, mamba2, x, state, seqs)

        return ready

    @property
    def memory(self) -> JointMemory:
        return JointMemory((self.attention.memory, self.mamba2.memory))

    def mixing_flops(self, length: int) -> float:
        return self.attention.mixing_flops(length) + self.mamba2.mixing_flops(length)


def _times(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1 else factor * x
