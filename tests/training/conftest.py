"""A small corpus with something to learn in it, and a small model with everything in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intarsia.data import TokenDataset, open_corpus, open_tokenizer, prepare
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.training import TrainConfig, TrainResult, train


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """80 documents of 20 to 400 words; bytes are the tokens."""
    directory = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), size)) for size in random.integers(2, 7, 60)]
    for index in range(80):
        text = " ".join(random.choice(words, random.integers(20, 400)))
        (directory / f"{index}.txt").write_text(text)
    return prepare(
        open_corpus(directory / "*.txt"), open_tokenizer("bytes"), directory / "tokens", progress=False
    )


@pytest.fixture(scope="session")
def model_config(dataset: TokenDataset) -> ModelConfig:
    """KDA and MLA, a dense layer and one of experts; rows and heads that two processes cannot share evenly."""
    return ModelConfig(
        vocab_size=dataset.vocab_size,
        d_model=24,
        depth=2,
        layout="kda mla",
        mixers={
            "kda": KDAConfig(num_heads=3, head_dim=8, head_v_dim=9),
            "mla": MLAConfig(num_heads=3, kv_rank=9, nope_dim=8, rope_dim=4, v_dim=7),
        },
        feed_forward=FeedForwardConfig(33),
        experts=ExpertsConfig(num_experts=5, d_hidden=12, num_active=2),
    )


@pytest.fixture(scope="session")
def train_config() -> TrainConfig:
    """Twelve steps that take a second."""
    return TrainConfig(
        steps=12,
        rows=4,
        length=48,
        lr=1e-2,
        warmup_steps=2,
        qk_clip=0.01,  # Low enough to be at work.
        muon_precision="float32",
        log_every=1,
        eval_every=5,
        eval_documents=3,
        checkpoint_every=4,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(model_config: ModelConfig, dataset: TokenDataset, directory: Path) -> Callable[..., TrainResult]:
    """Trains in a directory, this test's own by default."""

    def run(config: TrainConfig, where: Path = directory, **options: Any) -> TrainResult:
        return train(model_config, config, dataset, None, where, device="cpu", **options)

    return run
