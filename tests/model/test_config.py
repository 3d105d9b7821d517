"""Configurations say at construction what is wrong with them, and survive JSON."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from intarsia.errors import ConfigError
from intarsia.mixers import AttentionConfig, KDAConfig, MLAConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.model.config import parse_layout

MIXERS = {
    "kda": KDAConfig(num_heads=2, head_dim=16),
    "mla": MLAConfig(num_heads=2, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=16),
}


def config(**changes):
    values = {
        "vocab_size": 100,
        "d_model": 32,
        "depth": 8,
        "layout": "kda kda kda mla",
        "mixers": MIXERS,
        "feed_forward": FeedForwardConfig(64),
    }
    return ModelConfig(**{**values, **changes})


EXPERTS = ExpertsConfig(num_experts=8, d_hidden=16, num_active=2)


def test_the_layout_is_repeated_and_cut():
    assert config().layers == ("kda", "kda", "kda", "mla") * 2
    assert config(depth=6).layers == ("kda", "kda", "kda", "mla", "kda", "kda")
    assert config(depth=2).layers == ("kda", "kda")
    assert config(layout="kda*3 mla").layers == config().layers
    explicit = "kda mla kda kda mla mla kda mla"
    assert config(layout=explicit).layers == tuple(explicit.split())


@pytest.mark.parametrize("layout", ["", "  ", "kda*", "*3", "kda*0", "kda*-1", "kda*2*3", None, 3])
def test_a_layout_that_cannot_be_read(layout):
    with pytest.raises(ConfigError, match="layout"):
        parse_layout(layout)


def test_which_layers_have_experts():
    assert [config(experts=EXPERTS, dense_layers=2).has_experts(layer) for layer in range(4)] == [0, 0, 1, 1]
    assert not config().has_experts(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "kda kda mlaa"}, "unknown mixer 'mlaa'; did you mean 'mla'"),
        ({"layout": "gated"}, "there are: kda, mla"),
        ({"depth": 0}, "^depth must be at least 1; got 0"),
        ({"depth": 2.0}, "depth"),
        ({"d_model": True}, "d_model"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"init_std": float("nan")}, "init_std"),
        ({"tie_embeddings": "yes"}, "true or false"),
        ({"mixers": {}}, "mixers must map"),
        ({"mixers": {"kda": "kda", "mla": MIXERS["mla"]}}, "mixers.kda must be a table"),
        ({"feed_forward": 64}, "feed_forward must be a table; got 64"),
        ({"experts": {"num_experts": 8}}, "experts.d_hidden is missing"),
    ],
)
def test_what_cannot_be_right(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_active": 9}, "num_active \\(9\\) is above the 8 eligible"),
        ({"num_groups": 3}, "do not divide"),
        ({"num_groups": 2, "num_active_groups": 3}, "num_active_groups"),
        ({"num_groups": 4, "num_active": 3}, "the 2 eligible"),
        ({"num_groups": 8, "num_active_groups": 8}, "at least two"),
        ({"routing_weights": "none"}, "'unbiased' or 'biased'"),
        ({"num_shared": -1}, "num_shared"),
        ({"bias_update_rate": -0.1}, "bias_update_rate"),
        ({"normalize": 1}, "normalize"),
    ],
)
def test_experts_that_cannot_be_right(changes, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsConfig(**{"num_experts": 8, "d_hidden": 16, "num_active": 2, **changes})


@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_json_round_trip(experts):
    before = config(experts=experts, tie_embeddings=False)
    after = ModelConfig.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert hash(after) == hash(before)
    assert pickle.loads(pickle.dumps(before)) == copy.deepcopy(before) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(dept=3), "dept: unknown option; did you mean 'depth'"),
        (lambda d: d.pop("vocab_size"), "vocab_size is missing"),
        (lambda d: d["feed_forward"].update(width=3), "feed_forward.width: unknown option"),
        (lambda d: d.update(feed_forward=3), "feed_forward must be a table"),
        (lambda d: d.update(mixers=[]), "mixers must be a table"),
        (lambda d: d["mixers"]["kda"].update(type="kdaa"), "kdaa"),
        (lambda d: d["mixers"]["kda"].update(heads=3), "mixers.kda.heads: unknown option"),
    ],
)
def test_dictionaries_that_cannot_be_read(change, message):
    values = config().to_dict()
    change(values)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


def test_replace():
    assert config().replace(depth=4).depth == 4
    with pytest.raises(ConfigError, match="did you mean 'layout'"):
        config().replace(layuot="kda")
    with pytest.raises(ConfigError, match="unknown mixer"):
        config().replace(layout="gdn")


def test_the_mixers_cannot_be_changed_from_outside():
    mixers = dict(MIXERS)
    made = config(mixers=mixers)
    mixers["kda"] = AttentionConfig(2, 16)
    assert made.mixers["kda"] == MIXERS["kda"]
    with pytest.raises(TypeError):
        made.mixers["kda"] = mixers["kda"]
