"""The published shapes against transformers' models of the same configurations, parameter for parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intarsia.checkpoints.family import told
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.model import LanguageModel, ModelConfig, cost_of, presets
from intarsia.model.published import PUBLISHED
from support.published import SALA, theirs
from support.published_sala import PublishedSALA

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-next", "gpt-oss", "gpt-oss-20b", "olmo-hybrid", "minimax-01", "moonlight", "deepseek-v3.2",
        "glm-5.3-flash", "qwen3.8-flash-next", "minicpm-sala",
    ],
)  # fmt: skip
def test_has_the_parameters_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        ours = LanguageModel(presets.get(name))
        sizes = their_sizes(name)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(size for part, size in sizes if ".visual." not in part)
    assert count == ours.cost().parameters


def their_sizes(name: str) -> list[tuple[str, int]]:
    """The parameters of transformers' model; or, where it has none, the tensors of the released files."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if name == "minicpm-sala":
        return [(part, tensor.numel()) for part, tensor in PublishedSALA.tensors(SimpleNamespace(**SALA))]
    auto = AutoModelForImageTextToText if name == "glm-5.3-flash" else AutoModelForCausalLM
    return [(part, x.numel()) for part, x in auto.from_config(theirs(name)).named_parameters()]


@pytest.mark.parametrize(
    ("name", "billions", "pattern"),
    [
        ("minimax-01", 456, "lightning*7 attention"),
        ("qwen3-next", 80, "gdn*3 attention"),
        ("gpt-oss", 117, "window attention"),
        ("gpt-oss-20b", 21, "window attention"),
        ("olmo-hybrid", 7, "gdn*3 attention"),
        ("moonlight", 16, "mla"),
        ("deepseek-v3.2", 672, "dsa"),
        ("glm-5.3-flash", 313, "kda kda kda dsa"),
        ("qwen3.8-flash-next", 126, "gdn*3 qsa"),  # "125 B" beside the n-grams
    ],
)
def test_is_what_its_publishers_say(name: str, billions: int, pattern: str) -> None:
    config = presets.get(name)
    assert config.layout == pattern
    assert round(cost_of(config).parameters / 1e9) == billions


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("glm-5.3-flash", "glm5_next"),
        ("qwen3.8-flash-next", "qwen4_exp"),
        ("minicpm-sala", "minicpm_sala"),
        ("deepseek-v3.2", "deepseek_v32"),
        ("qwen3-next", "qwen3_next"),
    ],
)
def test_the_published_options_are_read_as_the_preset(name: str, of: str) -> None:
    values = SALA if name == "minicpm-sala" else theirs(name).get_text_config().to_dict()
    options = Options(values, "config.json")
    config = family(of).read(options)
    options.finish()
    assert told(config) == told(presets.get(name))


def test_every_published_shape_builds_small() -> None:
    """The same options at a width that can be run: a forward and a backward pass, and decoding."""
    tokens = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(0))
    for name in PUBLISHED:
        model = LanguageModel(shrunk(presets.get(name)))
        model.init_weights(seed=0)
        model(tokens, targets=tokens).nll.mean().backward()
        with torch.no_grad():
            whole = model(tokens).logits
            out = model(tokens[:, :30], states=model.init_states(1))
            out = model(tokens[:, 30:], states=out.states)
        torch.testing.assert_close(out.logits, whole[:, 30:], rtol=1e-3, atol=1e-4, msg=name)


def shrunk(config: ModelConfig) -> ModelConfig:
    """The configuration with everything wide made narrow."""
    values = config.to_dict()
    narrow = {
        "vocab_size": 50, "d_model": 32, "depth": 8, "num_heads": 4, "num_v_heads": 8, "num_kv_heads": 2, "head_dim": 8,
        "head_v_dim": 12, "d_hidden": 16, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8, "window": 10,
        "num_experts": 16, "num_active": 2, "q_rank": 12, "index_heads": 3, "index_dim": 8, "top_k": 12,
        "index_budget": 12, "rank": 5, "kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 8,
        "topk": 4,
    }  # fmt: skip

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: narrow[key] if key in narrow and isinstance(inner, int) else walk(inner)
                for key, inner in value.items()
            }
        return value

    return ModelConfig.from_dict(walk(values))
