"""Weights that are packed in files: read as if they were packed on loading, and refused where they are not whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import intarsia
from intarsia.checkpoints.convert import convert
from intarsia.checkpoints.native import load_config, load_extra, load_model, save_model
from intarsia.checkpoints.packed_native import bytes_of
from intarsia.errors import CheckpointError, ConfigError
from intarsia.files import sha256
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, InferenceModel, LanguageModel, ModelConfig

TOKENS = torch.arange(2 * 9).view(2, 9) % 300


def model(tied: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """With experts and a head that are large enough to be packed, an odd width, and maps that are too small."""
    config = ModelConfig(
        vocab_size=300, d_model=232, depth=2, layout="gdn attention",
        mixers={
            "gdn": GatedDeltaNetConfig(2, 80, num_v_heads=4, head_v_dim=72),
            "attention": AttentionConfig(
                4, 80, 2, rope=0.5, qk_norm="head", zero_centered_qk_norm=True, output_gate=True
            ),
        },
        feed_forward=FeedForwardConfig(320),
        experts=ExpertsConfig(
            num_experts=5, d_hidden=88, num_active=2, scores="softmax", shared_gate=True, num_shared=1,
            bias_update_rate=0,
        ),
        dense_layers=0, tie_embeddings=tied, norm_eps=1e-6, zero_centered_norms=True,
    )  # fmt: skip
    made = LanguageModel(config)
    made.init_weights(5)
    return made.to(dtype)


def decoded(ready: InferenceModel) -> list[Tensor]:
    """Logits of a prompt, and of two tokens behind it, which go through other code."""
    output = ready(TOKENS, last_only=False)
    logits = [output.logits]
    for step in (3, 4):
        output = ready(torch.full((2, 1), step), states=output.states)
        logits.append(output.logits)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("source", ["intarsia", "qwen3_5_moe"])
def test_the_same_logits_as_packed_on_loading(
    tmp_path: Path, source: str, weights: Any, tied: bool, dtype: torch.dtype
) -> None:
    intarsia.save(model(tied, dtype), tmp_path / "whole", source)
    assert convert(tmp_path / "whole", tmp_path / "packed", "intarsia", weights=weights) == "intarsia"
    ready = intarsia.load(tmp_path / "packed")
    assert isinstance(ready, InferenceModel)
    wanted = intarsia.load(tmp_path / "whole", weights=weights)
    for got, expected in zip(decoded(ready), decoded(wanted), strict=True):
        assert torch.equal(got, expected)
    assert ready.weight_bytes == wanted.weight_bytes
    names = set(load_file(tmp_path / "packed" / "model.safetensors"))
    packed = {name.removesuffix(".packed") for name in names if name.endswith(".packed")}
    assert "head.weight" in packed
    assert sum("gate_up" in name for name in packed) >= 2
    assert {"embed.weight", "norm.weight"} <= names
    assert not packed & names


def test_it_takes_what_it_says(tmp_path: Path) -> None:
    save_model(tmp_path / "whole", model(dtype=torch.bfloat16), extra={"step": 7})
    sizes = {}
    for weights in ("int8", "int4"):
        convert(tmp_path / "whole", tmp_path / weights, "intarsia", weights=weights)  # type: ignore[arg-type]
        format, sizes[weights] = bytes_of(tmp_path / weights)
        assert format == weights
        kept = intarsia.load(tmp_path / weights).weight_bytes
        # A stand-in for each weight that is packed has one number.
        assert 0 <= kept - sizes[weights] < 200
        values = json.loads((tmp_path / weights / "config.json").read_text())
        listed = values["weights"]["packed"]["tensors"]
        assert listed["head.weight"] == {"format": "int8", "group": 232}
        assert {x["format"] for x in listed.values()} == {"int8", weights}
        assert load_extra(tmp_path / weights) == {"step": 7}
        assert load_config(tmp_path / weights) == model().config
    whole = (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert sizes["int4"] < sizes["int8"] < 0.7 * whole


def test_what_is_asked_for_is_what_is_there(packed: Path) -> None:
    wanted = decoded(intarsia.load(packed))
    again = intarsia.load(packed, weights="int8")
    assert all(torch.equal(x, y) for x, y in zip(decoded(again), wanted, strict=True))
    with pytest.raises(ConfigError, match="are packed to int8 and cannot become int4"):
        intarsia.load(packed, weights="int4")
    with pytest.raises(ConfigError, match="int8 and cannot become int8 in groups of 64"):
        intarsia.load(packed, weights="int8", group=64)
    wide = intarsia.load(packed, dtype=torch.bfloat16)
    assert wide.model.embed.weight.dtype == torch.bfloat16
    assert wide.model.blocks[0].mixer.decay.A_log.dtype == torch.float32


def test_what_is_not_for_packed_weights_says_so(packed: Path, tmp_path: Path) -> None:
    for use in (
        lambda: load_model(packed),
        lambda: convert(packed, tmp_path / "out"),
        lambda: convert(packed, tmp_path / "out", "intarsia", weights="int8"),
    ):
        with pytest.raises(
            CheckpointError, match=r"are packed to int8, for inference.*the model that they were"
        ):
            use()
    save_model(tmp_path / "whole", model())
    for to in ("hf", "qwen3_5_moe"):
        with pytest.raises(ConfigError, match="--to intarsia"):
            convert(tmp_path / "whole", tmp_path / "out", to, weights="int8")
    with pytest.raises(ConfigError, match="int8 or int4; got 'bfloat16'"):
        convert(tmp_path / "whole", tmp_path / "out", "intarsia", weights="bfloat16")
    assert not (tmp_path / "out").exists()


def test_transformers_is_told(packed: Path) -> None:
    pytest.importorskip("transformers")
    from intarsia.integrations.huggingface import IntarsiaConfig

    with pytest.raises(Exception, match="packed for decoding"):
        IntarsiaConfig.from_pretrained(packed)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_model(tmp_path / "source", model())
    convert(tmp_path / "source", tmp_path / "packed", "intarsia", weights="int8")
    return tmp_path / "packed"


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """The tensors changed and the checksum right, as other tools would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edited(folder, lambda values: values["weights"].update(sha256=sha256(folder / "model.safetensors")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("head.weight.scales"), "head.weight.scales is missing"),
        (lambda t: t.update(more=torch.ones(2)), "more does not belong there"),
        (
            lambda t: t.update({"head.weight": torch.ones(300, 232)}),
            "head.weight does not belong there",
        ),
        (
            lambda t: t.update({"head.weight.packed": torch.ones(300, 232, dtype=torch.uint8)}),
            "head.weight.packed is [300, 232] and should be [300, 256]",
        ),
        (
            lambda t: t.update({"head.weight.scales": torch.ones(300, 1)}),
            "head.weight.scales is torch.float32 and should be torch.bfloat16",
        ),
    ],
    ids=["missing", "surplus", "twice", "shape", "dtype"],
)  # fmt: skip
def test_tensors_that_do_not_fit_name_themselves(
    packed: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    rewritten(packed, change)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        intarsia.load(packed)
    assert str(packed / "model.safetensors") in str(error.value)


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def told(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder, lambda x: x["weights"]["packed"].update(values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "checksums differ"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "checksums"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: edited(d, lambda v: v["weights"].pop("packed")), "weights.packed cannot be right"),
        (lambda d: edited(d, lambda v: v.update(version=1)), "weights.packed cannot be right"),
        (told(format="int3"), "got 'int3'"),
        (told(group="many"), "weights.packed cannot be right"),
        (told(group=64), r"feed_forward\.down is packed as .*'group': .* and this release has it as .*'group': 64"),
        (told(tensors=None), "must list what is packed"),
        (lambda d: edited(d, lambda v: v["weights"]["packed"].pop("least")), "'least' is missing"),
    ],
)  # fmt: skip
def test_damage_is_known_as_such(packed: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(packed)
    with pytest.raises(CheckpointError, match=said) as error:
        intarsia.load(packed)
    assert str(packed) in str(error.value)


def test_what_fails_leaves_what_was_there(packed: Path, tmp_path: Path) -> None:
    """A weight that is not finite is found when others have been written."""
    broken = model()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    save_model(tmp_path / "broken", broken)
    before = sorted((path.name, path.stat().st_size) for path in packed.iterdir())
    with pytest.raises(ConfigError, match="not finite"):
        convert(tmp_path / "broken", packed, "intarsia", weights="int4")
    assert sorted((path.name, path.stat().st_size) for path in packed.iterdir()) == before
    assert isinstance(intarsia.load(packed), InferenceModel)
