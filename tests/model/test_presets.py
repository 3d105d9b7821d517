"""Presets: sizes that match within a family, and the true Kimi Linear to the last tensor."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import ConfigError
from intarsia.model import LanguageModel, ModelConfig, cost_of, match_parameters, presets


def test_the_families_of_a_size_have_the_same_size():
    for size in presets.SIZES:
        target = cost_of(presets.get(f"kimi-linear-{size}")).non_embedding_parameters
        for family in presets.FAMILIES:
            if f"{family}-{size}" not in presets.PRESETS:
                continue
            parameters = cost_of(presets.get(f"{family}-{size}")).non_embedding_parameters
            assert abs(parameters - target) <= 0.01 * target, (family, size)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_a_configuration(name):
    config = presets.get(name, vocab_size=300)
    assert config.vocab_size == 300
    assert ModelConfig.from_dict(config.to_dict()) == config
    # The vocabulary changes nothing but embedding and head.
    assert config.replace(vocab_size=presets.get(name).vocab_size) == presets.get(name)


def test_layouts():
    assert presets.get("kimi-linear-small").layers == ("kda", "kda", "kda", "mla") * 2
    assert presets.get("gdn-hybrid-tiny").layers == ("gdn", "gdn", "gdn", "mla")
    assert presets.get("full-tiny").layers == ("mla",) * 4
    assert not presets.get("kimi-linear-tiny").mixers["mla"].rotate
    assert presets.get("gdn-hybrid-tiny").mixers["mla"].rotate
    assert presets.get("full-tiny").mixers["mla"].rotate
    assert presets.get("kimi-linear-rope").mixers["mla"].rotate
    assert presets.get("kimi-linear-rope").layers == presets.get("kimi-linear").layers
    assert presets.get("minimax-01-small").layers == ("lightning",) * 7 + ("attention",)
    assert presets.get("gpt-oss-tiny").mixers["window"].window == 128


def test_changes_and_wrong_names():
    assert presets.get("kimi-linear-tiny", depth=2).depth == 2
    with pytest.raises(ConfigError, match="did you mean 'kimi-linear-tiny'"):
        presets.get("kimi-linear-tyni")
    with pytest.raises(ConfigError, match="dept: unknown option"):
        presets.get("kimi-linear-tiny", dept=2)


@pytest.mark.parametrize("name", ["full-tiny", "kimi-linear-tiny-moe"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.9])
def test_matching(name, factor):
    config = presets.get(name)
    target = int(factor * cost_of(config).non_embedding_parameters)
    matched = match_parameters(config, target, tolerance=0.01)
    assert abs(cost_of(matched).non_embedding_parameters - target) <= 0.01 * target
    if config.experts is None:
        assert matched.feed_forward.d_hidden % 8 == 0
        assert matched.replace(feed_forward=config.feed_forward) == config
    else:
        assert matched.replace(experts=config.experts) == config


def test_matching_finely_and_not_at_all():
    config = presets.get("kimi-linear-nano")
    step = 3 * config.d_model * config.depth
    target = cost_of(config).non_embedding_parameters + 3 * step
    matched = match_parameters(config, target, tolerance=step / 2 / target)
    assert matched.feed_forward.d_hidden == config.feed_forward.d_hidden + 3
    with pytest.raises(ConfigError, match="the nearest"):
        match_parameters(config, 1000)
    with pytest.raises(ConfigError, match="the nearest"):
        match_parameters(config, target + step // 2, tolerance=1e-6)


def test_kimi_linear_48b_a3b():
    config = presets.get("kimi-linear-48b-a3b")
    assert [layer for layer, name in enumerate(config.layers) if name == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    with torch.device("meta"):
        model = LanguageModel(config)
    cost = model.cost()
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    # The published files hold the router's bias as a tensor too.
    biases = 26 * 256
    assert f"{(cost.parameters + biases) / 1e9:.2f} B" == "49.12 B"
    assert f"{cost.active_parameters / 1e9:.1f} B" == "3.1 B"

    # The tensors of the published checkpoint: shapes here, and how many tensors of theirs each one is.
    kda = {
        "q_proj.weight": ([4096, 2304], 1),
        "k_proj.weight": ([4096, 2304], 1),
        "v_proj.weight": ([4096, 2304], 1),
        "conv.weight": ([3 * 4096, 4], 3),
        "decay.A_log": ([32], 1),
        "decay.dt_bias": ([4096], 1),
        "decay_proj.0.weight": ([128, 2304], 1),
        "decay_proj.1.weight": ([4096, 128], 1),
        "output_gate_proj.0.weight": ([128, 2304], 1),
        "output_gate_proj.1.weight": ([4096, 128], 1),
        "beta_proj.weight": ([32, 2304], 1),
        "norm.weight": ([128], 1),
        "o_proj.weight": ([2304, 4096], 1),
    }
    mla = {
        "q_proj.weight": ([6144, 2304], 1),
        "kv_down_proj.weight": ([576, 2304], 1),
        "kv_norm.weight": ([512], 1),
        "kv_up_proj.weight": ([8192, 512], 1),
        "o_proj.weight": ([2304, 4096], 1),
    }
    dense = {
        "gate.weight": ([9216, 2304], 1),
        "up.weight": ([9216, 2304], 1),
        "down.weight": ([2304, 9216], 1),
    }
    experts = {
        "router.weight": ([256, 2304], 1),
        "router.bias": ([256], 1),
        "gate_up": ([256, 2 * 1024, 2304], 512),
        "down": ([256, 2304, 1024], 256),
        "shared.gate.weight": ([1024, 2304], 1),
        "shared.up.weight": ([1024, 2304], 1),
        "shared.down.weight": ([2304, 1024], 1),
    }
    expected = {
        "embed.weight": ([163840, 2304], 1),
        "head.weight": ([163840, 2304], 1),
        "norm.weight": ([2304], 1),
    }
    for layer, name in enumerate(config.layers):
        block = {f"mixer.{key}": value for key, value in (kda if name == "kda" else mla).items()}
        block |= {f"feed_forward.{key}": value for key, value in (experts if layer else dense).items()}
        block |= {f"{norm}_norm.weight": ([2304], 1) for norm in ("mixer", "feed_forward")}
        expected |= {f"blocks.{layer}.{key}": value for key, value in block.items()}
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: shape for name, (shape, _) in expected.items()}
    assert sum(count for _, count in expected.values()) == 20_493
