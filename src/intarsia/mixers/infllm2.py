"""InfLLM-v2 (Zhao et al. 2025, arXiv:2509.24663; MiniCPM-SALA, arXiv:2602.11761): blocks by the shares that attention
gives means of keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.growing import Entry
from intarsia.mixers.base import About, positive
from intarsia.mixers.sparse import Asked, SparseAttention, SparseAttentionConfig
from intarsia.ops import pick_blocks
from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class InfLLM2Config(SparseAttentionConfig):
    """The options of grouped attention, and those of the choice, named as MiniCPM's are.

    Means of the keys of `kernel_size` tokens, one each `kernel_stride`, are what a choice looks at. The query heads of
    a key-value head read `topk` blocks of `block_size` tokens together, the first `init_blocks` among them and those of
    the last `window_size` tokens.

    A token's choice depends on its own past alone, whatever the length of the text: the published code attends to
    everything in texts below a `dense_len`, which is not there.
    """

    type: ClassVar[str] = "infllm2"
    about = About(
        title="InfLLM-v2",
        year=2025,
        source="arXiv:2509.24663",
        family="softmax",
        equation="o_t = softmax(q_t K_P^T / sqrt(K)) V_P, P = top_n blocks by softmax(q_t mean(k))",
        brought="sparse attention without a parameter that dense attention can be switched to and back from",
        operator="sparse_attention",
        example={"num_heads": 8, "head_dim": 128, "num_kv_heads": 2},
    )
    kernel_size: int = field(default=32, kw_only=True)
    kernel_stride: int = field(default=16, kw_only=True)
    block_size: int = field(default=64, kw_only=True)
    init_blocks: int = field(default=1, kw_only=True)
    window_size: int = field(default=2048, kw_only=True)
    topk: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
            window_size=self.window_size,
            topk=self.topk,
        )
        if self.kernel_size % self.kernel_stride or self.block_size % self.kernel_stride:
            raise ConfigError(
                f"kernel_size={self.kernel_size} and block_size={self.block_size} are multiples of "
                f"kernel_stride={self.kernel_stride}"
            )
        if self.window_size % self.block_size:
            raise ConfigError(f"window_size={self.window_size} is of blocks of {self.block_size} tokens")
        if not 0 <= self.init_blocks <= self.topk - self.window_size // self.block_size:
            raise ConfigError(
                f"of topk={self.topk} blocks init_blocks={self.init_blocks} and the "
                f"{self.window_size // self.block_size} of the window are always read: too many"
            )

    def build(self, d_model: int, norm_eps: float = 1e-5) -> InfLLM2Attention:
        return InfLLM2Attention(d_model, self, norm_eps)


class InfLLM2Attention(SparseAttention):
    """Grouped attention of which the heads of each group read their own blocks:

        c_e = mean of the k of kernel_size tokens        p_he = softmax_e(q_ht · c_e / sqrt(K))
        P_gt = the first and the last blocks, and the best b by the largest sum_{h in g} p_he of an e that overlaps b
        o_t = softmax(q_t k_Pᵀ / sqrt(K)) v_P

    The means are float32. Where no sequence has more than `topk` blocks it is softmax attention.
    """

    config: InfLLM2Config

    def __init__(self, d_model: int, config: InfLLM2Config, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, config, norm_eps)
        self.block = config.block_size

    def choose(self, asked: Asked) -> Tensor | None:
        c, past = self.config, asked.past
        means = past.kept("means", asked.keys, c.kernel_stride, c.kernel_size, _mean)
        if max(past.lengths) <= self.most_read:
            return None
        return pick_blocks(
            asked.q,
            means,
            count=c.topk,
            block=c.block_size,
            groups=c.kv_heads,
            stride=c.kernel_stride,
            width=c.kernel_size,
            score="softmax",
            first=c.init_blocks,
            last=c.window_size // c.block_size,
            scale=c.logit_scale,
            tokens=past.lengths,
            cu_seqlens=past.seqs,
        )

    def index_entries(self) -> dict[str, Entry]:
        c = self.config
        return {"means": Entry((c.kv_heads, c.head_dim), "wide", stride=c.kernel_stride)}

    @property
    def most_read(self) -> int:
        return self.config.topk * self.config.block_size

    def index_flops(self, length: int) -> float:
        """A product of each token and head with each mean before."""
        c = self.config
        return c.num_heads * c.head_dim * length / c.kernel_stride


def _mean(rows: Tensor, numbers: Tensor) -> Tensor:
    """`[B, m, heads, K]` of windows `[B, m, width, heads, K]`."""
    return rows.detach().to(compute_dtype(rows)).mean(2)
