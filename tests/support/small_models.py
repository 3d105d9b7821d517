"""Small models of every mixer, for tests of states and of generation."""

from __future__ import annotations

import torch

from intarsia.model import LanguageModel, ModelConfig, presets
from intarsia.model.config import FeedForwardConfig
from support.mixer_cases import CASES

VOCAB = 97
# Every case of every mixer, under names that a layout can hold.
MIXERS = {case.replace(",", "").replace(" ", "-"): config for case, config in CASES.items()}
LAYOUTS = [*MIXERS, "kda*3 mla", "gdn*3 mla-rotated", "gdn kda attention mla"]


def build(layout: str, seed: int = 0, **changes: object) -> LanguageModel:
    times = [int(([*name.split("*"), "1"])[1]) for name in layout.split()]
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        depth=max(2, sum(times)),
        layout=layout,
        mixers=MIXERS,
        feed_forward=FeedForwardConfig(d_hidden=48),
        tie_embeddings=False,  # tied and untrained, a model repeats its last token
        init_std=0.1,  # logits far enough apart that they say something
    ).replace(**changes)
    model = LanguageModel(config)
    model.init_weights(seed)
    return model.eval()


def tokens_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def recurrent(model: LanguageModel) -> bool:
    """Whether all its states have a fixed size."""
    return all(state.kind == "recurrent" for state in model.init_states(1).layers)


def preset(name: str) -> LanguageModel:
    """A preset with a small vocabulary, in float64."""
    model = LanguageModel(presets.get(name, vocab_size=VOCAB))
    model.init_weights(0)
    return model.double().eval()


SMALLEST = [name for name in presets.names() if name.endswith("-nano")]
