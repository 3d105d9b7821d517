"""Training configurations that cannot be right are refused with a reason."""

from __future__ import annotations

import json

import pytest

from intarsia.errors import ConfigError
from intarsia.training import TrainConfig


def test_round_trip_through_json():
    config = TrainConfig(steps=7, qk_clip=100.0, adamw_betas=(0.8, 0.9), grad_clip=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(lr=1.0).lr == 1.0
    assert config.tokens == 7 * 16 * 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": "fast"}, "finite number"),
        ({"optimizer": "sgd"}, "'muon' or 'adamw'"),
        ({"precision": "fp8"}, "'float32' or 'bf16'"),
        ({"muon_momentum": 1.0}, "below 1"),
        ({"adamw_betas": (0.9,)}, "a list of 2"),
        ({"adamw_betas": (0.9, 1.0)}, "below 1"),
        ({"decay_fraction": 1.5}, "at most 1"),
        ({"weight_decay": -0.1}, "at least 0"),
        ({"warmup_steps": 10}, "fewer than steps"),
        ({"rows": 6, "micro_rows": 4}, "micro_rows must divide rows"),
        ({"eval_every": 0}, "eval_every"),
        ({"adamw_betas": 3}, "a list of 2"),
        ({"activation_checkpointing": "no"}, "true or false; got 'no'"),
        ({"nonsense": 1}, "nonsense: unknown option"),
    ],
)
def test_what_cannot_be_right_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict({"steps": 10, **changes})


def test_rows_are_shared_evenly_or_refused():
    config = TrainConfig(steps=1, rows=12, micro_rows=2)
    assert config.rows_per_rank(3) == 4
    with pytest.raises(ConfigError, match="number of processes"):
        config.rows_per_rank(5)
    with pytest.raises(ConfigError, match="multiple of micro_rows"):
        config.rows_per_rank(4)
