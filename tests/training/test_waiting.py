"""Nothing in a step waits for the device: no number of a tensor decides what the host does next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from intarsia.data import BatchLoader
from intarsia.ops import native
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner
from support.device import device
from support.waiting import Waits


def test_waiting_is_seen() -> None:
    x = torch.arange(4.0)
    for wait in (
        x.sum().item,
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: x.repeat_interleave(x.long()),
    ):
        with Waits() as waits:
            wait()
        assert waits.found, wait


@contextmanager
def nobody_waits() -> Iterator[None]:
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with Waits() as waits:
            yield
        assert not waits.found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "grad_clip": None, "qk_clip": None},
        {"micro_rows": 1, "activation_checkpointing": True, "precision": "bf16"},
    ],
    ids=["muon", "adamw", "recomputed in pieces"],
)
def test_no_step_waits(model_config, train_config, dataset, changes, monkeypatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, native.OFF)  # the forms that GPUs compute
    native._load.cache_clear()
    try:
        config = train_config.replace(**changes)
        learner = Learner.new(model_config, config, Processes(device=device()))
        loader = BatchLoader(dataset.train, rows=config.rows, length=config.length, seed=0)
        results = [learner.step(loader.next(), 0)]  # the first makes what others use again
        with nobody_waits():
            results += [learner.step(loader.next(), step) for step in (1, 2)]
        assert all(result.loss < 10 for result in results)
        assert [result.step for result in results] == [1, 2, 3]
    finally:
        native._load.cache_clear()
