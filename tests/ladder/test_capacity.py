"""How many runs are made at a time: as many as cores and memory allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.ladder import capacity
from intarsia.ladder.arms import resolve
from intarsia.ladder.capacity import Capacity, keep_time, possible_jobs, read_state, run_bytes
from intarsia.model import LanguageModel, ModelConfig, cost_of, presets
from intarsia.ops import Sequences
from intarsia.training import TrainConfig
from support.comparison import make_plan

CONFIG = TrainConfig(steps=10, rows=4, length=128)
NARROW = {"d_model": 64, "feed_forward": {"d_hidden": 176}}
# The mixers that keep most for the backward pass, and those of the demonstration.
MIXERS = {
    "trnn": {"type": "trnn", "channels": 64},
    "rwkv7": {"type": "rwkv7", "num_heads": 2, "head_dim": 32},
    "kda": {"type": "kda", "num_heads": 2, "head_dim": 32},
    "mla": {"type": "mla", "num_heads": 2, "kv_rank": 16, "nope_dim": 32, "rope_dim": 16, "v_dim": 32},
}


def kept_for_backward(config: ModelConfig) -> int:
    """Bytes of what autograd keeps of a forward pass over a step's tokens, weights left out."""
    model = LanguageModel(config)
    model.init_weights(0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    tokens = torch.randint(0, config.vocab_size, (1, CONFIG.rows * CONFIG.length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, targets=tokens, seqs=Sequences((CONFIG.length,) * CONFIG.rows))
    return sum(sizes.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_guess_errs_on_the_large_side_and_not_by_much(mixer: str) -> None:
    config = presets.get("kimi-linear-nano", vocab_size=300).to_dict()
    config = ModelConfig.from_dict({**config, **NARROW, "layout": "m", "mixers": {"m": MIXERS[mixer]}})
    guess = run_bytes(0, config, CONFIG) - run_bytes(0, config, CONFIG.replace(rows=1, length=1))
    assert 1 < guess / kept_for_backward(config) < 4


def test_each_part_of_the_guess_counts() -> None:
    model = presets.get("kimi-linear-nano", vocab_size=300)
    least = run_bytes(0, model, CONFIG.replace(rows=1, length=1))
    assert 300 * 2**20 < least < 600 * 2**20, "Python and PyTorch alone"
    # Float32 weights, gradients, AdamW's two moments, and a copy that is being saved.
    assert run_bytes(1_000_000, model, CONFIG) - run_bytes(0, model, CONFIG) == 5 * 4 * 1_000_000

    def of_tokens(model: ModelConfig, config: TrainConfig) -> int:
        return run_bytes(0, model, config) - run_bytes(
            0, model, config.replace(rows=1, length=1, micro_rows=None)
        )

    once = of_tokens(model, CONFIG)
    assert of_tokens(model, CONFIG.replace(length=256)) == pytest.approx(2 * once, rel=0.01)
    assert of_tokens(model.replace(depth=2 * model.depth), CONFIG) == 2 * once
    assert of_tokens(model.replace(d_model=2 * model.d_model), CONFIG) == 2 * once
    assert of_tokens(model, CONFIG.replace(micro_rows=2)) == pytest.approx(once / 2, rel=0.01)


def test_jobs_fit_into_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = resolve(make_plan(), 300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(capacity, "cores", lambda: 100)
    needs = [run_bytes(arm.parameters, arm.config, CONFIG) for arm in arms]
    need = max(needs)
    assert all(arm.parameters == cost_of(arm.config).parameters for arm in arms)

    def jobs(memory: float) -> int:
        monkeypatch.setattr(capacity, "available_memory", lambda: int(memory))
        return possible_jobs(18, needs)

    # Three tenths of what is free are left to others.
    assert jobs(5.01 * need / 0.7) == 5
    assert jobs(4.99 * need / 0.7) == 4
    assert jobs(0.1 * need) == 1, "one run is tried in any case"
    assert jobs(1000 * need) == 18, "no more than there are runs"
    monkeypatch.setattr(capacity, "cores", lambda: 2)
    assert jobs(1000 * need) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert jobs(1000 * need) == 1, "runs on one GPU would share its memory"


def test_threads_are_kept_for_the_directorys_lifetime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 8)
    assert Capacity.of(tmp_path, None, 4) == Capacity(jobs=4, threads=2)
    assert Capacity.of(tmp_path, None, 8) == Capacity(jobs=4, threads=2), "two threads each are all cores"
    assert Capacity.of(tmp_path, 8, 1) == Capacity(jobs=8, threads=2), "what was asked for"
    monkeypatch.setattr(capacity, "cores", lambda: 1)
    assert Capacity.of(tmp_path, None, 1) == Capacity(jobs=1, threads=2), (
        "a smaller machine gives the same numbers"
    )


def test_the_time_of_all_sittings_is_added_up(tmp_path: Path) -> None:
    Capacity.of(tmp_path, 1, 1)
    assert keep_time(tmp_path, 1.5) == 1.5
    assert keep_time(tmp_path, 2.0) == 3.5
    assert "threads" in read_state(tmp_path)
