"""The configurations on which every mixer is tested, small and with all dimensions different."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from intarsia.layers.rope import Yarn
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, KDAConfig, Mixer, MixerConfig, MLAConfig
from intarsia.mixers.channel_mixing import ChannelMixingConfig
from intarsia.mixers.comba import CombaConfig
from intarsia.mixers.deltaformer import DeltaFormerConfig
from intarsia.mixers.deltanet import DeltaNetConfig
from intarsia.mixers.deltaproduct import DeltaProductConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.forgetting import ForgettingConfig
from intarsia.mixers.gated_convolution import GatedConvolutionConfig
from intarsia.mixers.gated_deltanet2 import GatedDeltaNet2Config
from intarsia.mixers.gla import GLAConfig
from intarsia.mixers.hgrn2 import HGRN2Config
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.lightning import LightningConfig
from intarsia.mixers.linear_attention import LinearAttentionConfig
from intarsia.mixers.longhorn import LonghornConfig
from intarsia.mixers.mamba import MambaConfig
from intarsia.mixers.mamba2 import Mamba2Config
from intarsia.mixers.moba import MoBAConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.mixers.nsa import NSAConfig
from intarsia.mixers.parallel import ParallelConfig
from intarsia.mixers.path import PathConfig
from intarsia.mixers.performer import PerformerConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.mixers.retnet import RetNetConfig
from intarsia.mixers.rwkv7 import RWKV7Config
from intarsia.mixers.simplicial import SimplicialConfig
from intarsia.mixers.sliding_window import SlidingWindowConfig
from intarsia.mixers.static_sparse import StaticSparseConfig
from intarsia.mixers.trnn import TRNNConfig
from support.device import device

D_MODEL = 24

CASES: dict[str, MixerConfig] = {
    "kda": KDAConfig(num_heads=2, head_dim=8, head_v_dim=12),
    "kda bounded, swish, full rank": KDAConfig(
        2, 8, gate="bounded", output_gate="swish", decay_rank=None, output_gate_rank=None
    ),
    "kda without convolution or gate": KDAConfig(
        3, 8, 4, conv_size=None, output_gate="none", negative_eigenvalues=True
    ),
    "kda with more value heads and a bias": KDAConfig(2, 8, 6, num_v_heads=4, output_gate_bias=True),
    "gdn": GatedDeltaNetConfig(num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6),
    "gdn without convolution": GatedDeltaNetConfig(2, 8, conv_size=None, negative_eigenvalues=True),
    "deltanet": DeltaNetConfig(num_heads=2, head_dim=8, head_v_dim=12),
    "deltanet of 2021": DeltaNetConfig(3, 8, feature_map="elu", conv_size=None),
    "deltanet gated": DeltaNetConfig(2, 8, 6, output_gate="swish", negative_eigenvalues=True),
    "deltaproduct": DeltaProductConfig(num_heads=2, head_dim=8, head_v_dim=12),
    "deltaproduct of three steps, without decay": DeltaProductConfig(
        3, 8, 6, steps=3, decay=False, output_gate="none", negative_eigenvalues=False
    ),
    "gated deltanet 2": GatedDeltaNet2Config(num_heads=2, head_dim=8, head_v_dim=12),
    "gated deltanet 2 without convolution": GatedDeltaNet2Config(
        3, 8, 6, conv_size=None, rank=5, negative_eigenvalues=True, output_gate="sigmoid"
    ),
    "rwkv7": RWKV7Config(num_heads=2, head_dim=8, head_v_dim=12, decay_rank=5, rate_rank=6, gate_rank=7),
    "comba": CombaConfig(num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6),
    "comba without convolution or correction": CombaConfig(3, 8, conv_size=None, correction=None),
    "attention": AttentionConfig(num_heads=4, head_dim=8),
    "attention grouped, partial rope": AttentionConfig(4, 8, num_kv_heads=2, rope=0.5),
    "attention without positions": AttentionConfig(2, 8, rope=0.0),
    "attention gated, each head normed": AttentionConfig(
        4, 8, 2, rope=0.25, qk_norm="head", zero_centered_qk_norm=True, output_gate=True
    ),
    "attention, all heads normed": AttentionConfig(3, 8, qk_norm="channels"),
    "attention with sinks and biases": AttentionConfig(6, 32, 2, yarn=Yarn(4.0, 32), sinks=True, bias=True),
    "attention with its own scale": AttentionConfig(4, 8, num_kv_heads=2, scale=0.7),
    "window": SlidingWindowConfig(num_heads=3, head_dim=8, window=48),
    "window with sinks and biases": SlidingWindowConfig(
        4, 32, 2, yarn=Yarn(4.0, 32, truncate=False), sinks=True, bias=True, window=100
    ),
    "mla": MLAConfig(num_heads=2, kv_rank=10, nope_dim=8, rope_dim=4, v_dim=6),
    "mla rotated": MLAConfig(2, 10, 8, 4, 14, rotate=True),
    "mla rotated, query rank": MLAConfig(2, 10, 8, 4, 6, q_rank=12, rotate=True),
    "mla stretched": MLAConfig(
        2, 10, 8, 4, 6, rotate=True, yarn=Yarn(8.0, 16, attention_factor=1.0), yarn_logits=1.0
    ),
    "mla gated": MLAConfig(3, 10, 8, 4, 6, rotate=True, head_gate=True),
    "mla, each channel gated": MLAConfig(3, 10, 8, 4, 6, q_rank=12, output_gate=True),
    "dsa": DSAConfig(2, 10, 8, 4, 6, q_rank=12, rotate=True, index_heads=3, index_dim=8, top_k=20),
    "dsa without positions or query rank": DSAConfig(
        3, 10, 8, 4, 6, head_gate=True, index_heads=2, index_dim=6, index_relu=False, top_k=16
    ),
    "msa": MSAConfig(4, 8, 2, rope=0.5, index_dim=6, index_block_size=8, index_topk_blocks=3),
    "msa of each head, all normed": MSAConfig(
        4,
        8,
        2,
        qk_norm="head",
        zero_centered_qk_norm=True,
        output_gate=True,
        index_heads=4,
        index_dim=10,
        index_block_size=4,
        index_topk_blocks=5,
        index_local_blocks=2,
    ),
    "moba": MoBAConfig(4, 8, 2, block_size=16, top_k=4),
    "moba of small blocks": MoBAConfig(3, 8, rope=0.5, qk_norm="head", block_size=4, top_k=9),
    "qsa": QSAConfig(
        4,
        8,
        2,
        rope=0.5,
        qk_norm="head",
        zero_centered_qk_norm=True,
        output_gate=True,
        index_heads=3,
        index_dim=6,
        index_budget=24,
        index_ratio=4,
    ),
    "infllm2": InfLLM2Config(
        4, 8, 2, rope=0.0, kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=6
    ),
    "nsa": NSAConfig(
        4,
        8,
        2,
        compress_block=8,
        compress_stride=4,
        select_block=8,
        select_count=5,
        window=12,
    ),
    "nsa normed, of long blocks": NSAConfig(
        3,
        8,
        rope=0.5,
        qk_norm="head",
        output_gate=True,
        bias=True,
        compress_block=12,
        compress_stride=4,
        compress_dim=5,
        select_block=16,
        select_count=3,
        select_last=1,
        window=20,
    ),
    "static": StaticSparseConfig(4, 8, 2, block_size=4, local_blocks=3, stride_blocks=4),
    "static of single tokens, fixed": StaticSparseConfig(
        3, 8, rope=0.5, block_size=1, local_blocks=9, stride_blocks=5, sink_blocks=2, pattern="fixed"
    ),
    "dsa of pools": DSAConfig(2, 10, 8, 4, 6, q_rank=12, index_heads=3, index_dim=8, top_k=24, index_pool=4),
    "mla without shared channels": MLAConfig(2, 10, 8, 0, 6),
    "mamba": MambaConfig(expand=1, state_dim=5, dt_rank=3),
    "mamba2": Mamba2Config(num_heads=3, head_dim=8, state_dim=10),
    "mamba2 grouped, limited": Mamba2Config(4, 6, 8, num_groups=2, conv_size=3, dt_min=0.2, dt_max=1.0),
    "mamba2 scaled, norm first": Mamba2Config(
        4, 6, 8, num_groups=2, input_scales=(0.5, 1.5, 0.7, 1.2, 2.0), norm="before_gate"
    ),
    "mamba2 without a norm": Mamba2Config(3, 8, 10, norm="none"),
    "parallel": ParallelConfig(
        AttentionConfig(4, 8, num_kv_heads=2), Mamba2Config(3, 8, 10), attention_out=0.7, mamba2_out=1.3
    ),
    "mamba2 with biases": Mamba2Config(3, 8, 10, bias=True, conv_bias=False),
    "conv": GatedConvolutionConfig(),
    "channel-mix": ChannelMixingConfig(d_hidden=20),
    "channel-mix without the shift": ChannelMixingConfig(d_hidden=20, shift=False),
    "conv with biases": GatedConvolutionConfig(conv_size=4, bias=True),
    "lightning": LightningConfig(num_heads=3, head_dim=8, head_v_dim=6),
    "lightning of Ling": LightningConfig(
        4, 8, decay_from=1, silu=False, qk_norm=True, rope=0.5, yarn=Yarn(4.0, 32), scale=0.35, norm_groups=2
    ),
    "longhorn": LonghornConfig(expand=1, state_dim=5, dt_rank=3),
    "fox": ForgettingConfig(num_heads=3, head_dim=8),
    "fox pro": ForgettingConfig(2, 8, qk_norm=True, output_gate=True, kv_shift=True),
    "trnn": TRNNConfig(channels=20),
    "linear": LinearAttentionConfig(num_heads=2, head_dim=8, head_v_dim=6),
    "performer": PerformerConfig(num_heads=2, head_dim=8, head_v_dim=6, num_features=10),
    "retnet": RetNetConfig(num_heads=3, head_dim=8, head_v_dim=6),
    "gla": GLAConfig(num_heads=2, head_dim=8, head_v_dim=6, decay_rank=5),
    "gla full rank": GLAConfig(3, 8, decay_rank=None, tau=4.0),
    "hgrn2": HGRN2Config(num_heads=2, head_dim=8, head_v_dim=6),
    "hgrn2 bounded": HGRN2Config(3, 8, lower_bound=0.5),
    "path": PathConfig(num_heads=2, head_dim=8, w_rank=5),
    "path with a forget gate": PathConfig(3, 8, w_rank=None, conv_size=None, forget_gate=True),
    "deltaformer": DeltaFormerConfig(num_heads=2, head_dim=8),
    "deltaformer with its own strength": DeltaFormerConfig(3, 8, erase="own", strength="linear", rope=False),
    "simplicial": SimplicialConfig(num_heads=2, head_dim=6, window1=40, window2=5),
    "simplicial with all first keys": SimplicialConfig(3, 8, window1=None, window2=3, bias=False),
}

# The example of docs/new-mixer.md must hold what every mixer holds.
TUTORIAL = Path(__file__).parents[2] / "examples" / "new_mixer" / "learned_decay.py"
CASES["learned-decay of the tutorial"] = runpy.run_path(str(TUTORIAL), run_name="learned_decay")[
    "LearnedDecayConfig"
](num_heads=2, head_dim=8)


def build(case: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
    """The mixer with weights large enough that every part of it matters."""
    mixer = CASES[case].build(D_MODEL)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in mixer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        if "norm" in name:
            parameter.data += 1
    return mixer.to(device(), dtype)
