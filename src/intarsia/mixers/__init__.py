"""Token mixers: how tokens exchange information. One file each; `registry.py` is the table of all."""

from intarsia.layers.float32 import KeepsFloat32, float32_parts
from intarsia.layers.growing import GrowingState
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState
from intarsia.layers.states import State
from intarsia.mixers.attention import Attention, AttentionConfig
from intarsia.mixers.base import About, Cost, Mixer, MixerConfig
from intarsia.mixers.channel_mixing import ChannelMixing, ChannelMixingConfig
from intarsia.mixers.comba import Comba, CombaConfig
from intarsia.mixers.deltaformer import DeltaFormer, DeltaFormerConfig
from intarsia.mixers.deltanet import DeltaNet, DeltaNetConfig
from intarsia.mixers.deltaproduct import DeltaProduct, DeltaProductConfig
from intarsia.mixers.forgetting import ForgettingAttention, ForgettingConfig
from intarsia.mixers.gated_convolution import GatedConvolution, GatedConvolutionConfig
from intarsia.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from intarsia.mixers.gated_deltanet2 import GatedDeltaNet2, GatedDeltaNet2Config
from intarsia.mixers.gla import GatedLinearAttention, GLAConfig
from intarsia.mixers.hgrn2 import HGRN2, HGRN2Config
from intarsia.mixers.kda import KDAConfig, KimiDeltaAttention
from intarsia.mixers.lightning import LightningAttention, LightningConfig
from intarsia.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from intarsia.mixers.longhorn import Longhorn, LonghornConfig
from intarsia.mixers.mamba import Mamba, MambaConfig
from intarsia.mixers.mamba2 import Mamba2, Mamba2Config
from intarsia.mixers.mla import LatentAttention, MLAConfig
from intarsia.mixers.parallel import Parallel, ParallelConfig
from intarsia.mixers.path import PathAttention, PathConfig
from intarsia.mixers.performer import Performer, PerformerConfig
from intarsia.mixers.registry import config_from_dict, config_to_dict, mixer, mixers, names
from intarsia.mixers.retnet import RetNet, RetNetConfig
from intarsia.mixers.rwkv7 import RWKV7, RWKV7Config
from intarsia.mixers.simplicial import SimplicialAttention, SimplicialConfig
from intarsia.mixers.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from intarsia.mixers.trnn import TRNN, TRNNConfig

__all__ = [
    "HGRN2",
    "RWKV7",
    "TRNN",
    "About",
    "Attention",
    "AttentionConfig",
    "ChannelMixing",
    "ChannelMixingConfig",
    "Comba",
    "CombaConfig",
    "Cost",
    "DeltaFormer",
    "DeltaFormerConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaProduct",
    "DeltaProductConfig",
    "ForgettingAttention",
    "ForgettingConfig",
    "GLAConfig",
    "GatedConvolution",
    "GatedConvolutionConfig",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaNet2Config",
    "GatedDeltaNetConfig",
    "GatedLinearAttention",
    "GrowingState",
    "HGRN2Config",
    "KDAConfig",
    "KeepsFloat32",
    "KimiDeltaAttention",
    "LatentAttention",
    "LightningAttention",
    "LightningConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "Longhorn",
    "LonghornConfig",
    "MLAConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "Parallel",
    "ParallelConfig",
    "PathAttention",
    "PathConfig",
    "Performer",
    "PerformerConfig",
    "RWKV7Config",
    "RecurrentMemory",
    "RecurrentState",
    "RetNet",
    "RetNetConfig",
    "SimplicialAttention",
    "SimplicialConfig",
    "SlidingWindowAttention",
    "SlidingWindowConfig",
    "State",
    "TRNNConfig",
    "config_from_dict",
    "config_to_dict",
    "float32_parts",
    "mixer",
    "mixers",
    "names",
]
