"""What MiniCPM-SALA's files say that is not built, and how its blocks are counted."""

from __future__ import annotations

from typing import Any

import pytest

from intarsia.checkpoints.family import written
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.registry import family
from intarsia.errors import UnsupportedError
from intarsia.mixers import LightningConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.model import presets
from support.published import SALA


def read(**changes: Any) -> Any:
    options = Options({**SALA, **changes}, "config.json")
    config = family("minicpm_sala").read(options)
    options.finish()
    return config


def test_its_window_is_beside_the_blocks_that_it_chooses() -> None:
    config = read()
    blocks, linear = config.mixers["infllm2"], config.mixers["lightning"]
    assert isinstance(blocks, InfLLM2Config)
    assert isinstance(linear, LightningConfig)
    assert (blocks.topk, blocks.window_size, blocks.block_size, blocks.rope) == (96, 2048, 64, 0.0)
    assert [linear.at_layer(layer, 32).decay_factor for layer in (0, 31)] == [1.0, 1.0]


def test_its_factors_are_written_to_the_bit() -> None:
    values = written(family("minicpm_sala"), presets.get("minicpm-sala"))
    assert (values["scale_emb"], values["dim_model_base"]) == (12.0, 256)
    assert values["scale_depth"] == pytest.approx(1.4)
    assert values["sparse_config"]["topk"] == 64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lightning_nkv": 4}, "fewer heads of keys"),
        ({"lightning_nh": 24, "lightning_nkv": 24}, "power of 2"),
        ({"lightning_scale": "d"}, "lightning_scale"),
        ({"use_output_norm": False}, "norm of its output"),
        ({"attention_bias": True}, "biases"),
        ({"mixer_types": ["minicpm4"]}, "mixer_types has 1 layers"),
        ({"mixer_types": ["mamba"] * 32}, "'mamba'"),
        ({"sparse_config": {"use_nope": True}}, "use_nope"),
    ],
)
def test_what_is_not_built_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        read(**changes)
