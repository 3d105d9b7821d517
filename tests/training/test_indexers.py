"""Indexers learn beside the model, and change nothing of what it learns."""

from __future__ import annotations

import pytest
import torch

from intarsia.data import BatchLoader
from intarsia.mixers.dsa import DSAConfig
from intarsia.model import LanguageModel
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner
from intarsia.training.optimizers import build_optimizers


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_indexers_loss_moves_indexers_alone(model_config, train_config, dataset, optimizer, recompute):
    config = train_config.replace(optimizer=optimizer, grad_clip=None, qk_clip=None)
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    found = {}
    for counts in (0.0, 1.0):
        dsa = DSAConfig(3, 9, 8, 4, 7, index_heads=2, index_dim=6, top_k=10, rotate=True, index_loss=counts)
        model = LanguageModel(model_config.replace(mixers={**model_config.mixers, "mla": dsa}))
        model.init_weights(0)
        model.activation_checkpointing = recompute
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result = Learner(model, build_optimizers(model, config), config, Processes()).step(batch, 0)
        found[counts] = result.nll, before, model.state_dict()
    (nll, before, without), (other_nll, _, with_loss) = found[0.0], found[1.0]
    assert nll == other_nll
    for name in before:
        changed = not torch.equal(with_loss[name], before[name])
        if "indexer" in name:
            assert changed, name
            assert torch.equal(without[name], before[name]), name
        else:
            assert torch.equal(with_loss[name], without[name]), name
