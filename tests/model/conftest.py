"""Small models of every kind."""

from __future__ import annotations

import pytest
import torch

from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, KDAConfig, MLAConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, LanguageModel, ModelConfig
from support.device import device

MIXERS = {
    "kda": KDAConfig(num_heads=2, head_dim=16, head_v_dim=24),
    "gdn": GatedDeltaNetConfig(num_heads=2, head_dim=16, num_v_heads=4),
    "mla": MLAConfig(num_heads=2, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=24),
    "mla-rope": MLAConfig(num_heads=2, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=16, rotate=True),
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=0.5),
}
EXPERTS = ExpertsConfig(num_experts=8, d_hidden=16, num_active=2)


def tiny_config(layout="kda gdn mla mla-rope attention", experts=EXPERTS, **changes) -> ModelConfig:
    values = {
        "vocab_size": 97,
        "d_model": 32,
        "depth": len(layout.split()),
        "layout": layout,
        "mixers": MIXERS,
        "feed_forward": FeedForwardConfig(40),
        "experts": experts,
        "init_std": 0.2,
    }
    return ModelConfig(**{**values, **changes})


@pytest.fixture
def make_model():
    """Builds a model with all mixers, experts in all layers but the first, and weights from a seed."""

    def make(seed=0, **changes) -> LanguageModel:
        model = LanguageModel(tiny_config(**changes))
        model.init_weights(seed)
        return model.to(device())

    return make


@pytest.fixture
def tokens():
    """Two sequences of 70 tokens: more than one chunk."""
    return torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0))
