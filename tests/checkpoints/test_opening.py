"""What is refused, and what is said, when published checkpoints are opened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import intarsia
from intarsia.checkpoints.opening import family_that_holds, load_config
from intarsia.checkpoints.registry import CHECKPOINTS, family
from intarsia.checkpoints.writing import save_as
from intarsia.errors import CheckpointError, ConfigError, UnsupportedError
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig
from intarsia.model import FeedForwardConfig, InferenceModel, LanguageModel, ModelConfig
from support.small_models import MIXERS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def small() -> LanguageModel:
    config = ModelConfig(
        vocab_size=50, d_model=24, depth=3, layout="gdn attention gdn",
        mixers={
            "gdn": GatedDeltaNetConfig(2, 8, num_v_heads=4, head_v_dim=4),
            "attention": AttentionConfig(
                3, 8, 1, rope=0.5, qk_norm="head", zero_centered_qk_norm=True, output_gate=True
            ),
        },
        feed_forward=FeedForwardConfig(20), tie_embeddings=False, norm_eps=1e-6, zero_centered_norms=True,
    )  # fmt: skip
    model = LanguageModel(config)
    model.init_weights(3)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    intarsia.save(small(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_as(family("qwen3_5"), small(), tmp_path / "model", shard=9000)
    return tmp_path / "model"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_weights(model: LanguageModel, other: LanguageModel) -> bool:
    mine, yours = model.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def test_comes_back_as_it_was(folder: Path) -> None:
    assert same_weights(intarsia.load(folder), small())
    assert load_config(folder).layers == ("gdn", "attention", "gdn")


def test_shards_are_the_same_model(sharded: Path) -> None:
    assert len(list(sharded.glob("model-0*"))) > 2
    assert same_weights(intarsia.load(sharded), small())


def test_saving_over_shards_leaves_none_of_them(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    intarsia.save(small(), sharded)
    assert {path.name for path in sharded.iterdir()} == {WEIGHTS, "config.json", "tokenizer.json"}


def test_our_own_format_is_opened_too(tmp_path: Path) -> None:
    intarsia.save(small(), tmp_path, "intarsia")
    assert same_weights(intarsia.load(tmp_path), small())
    assert intarsia.load(tmp_path, weights="int8").config == small().config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), f"model.extra in .*{WEIGHTS} belongs to nothing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm.weight in .*\[7\] and should be \[24\]"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(5, 24)}), "q_proj.weight in"),
        (lambda t: t.update({"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}), "float8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int64)}), "int64"),
    ],
    ids=["missing", "surplus", "shape", "of a split", "float8", "integers"],
)  # fmt: skip
def test_tensors_that_do_not_fit_name_themselves(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    changed(folder, change)
    with pytest.raises(CheckpointError, match=said):
        intarsia.load(folder)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: cut(path, path.stat().st_size - 1), "was cut off: its tensors have"),
        (lambda path: cut(path, 500), "no whole header"),
        (lambda path: cut(path, 4), "no whole header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F99"')), "F99"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "its tensors have"),
        (
            lambda path: path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:]),
            "no whole header",
        ),
    ],
    ids=["cut", "cut header", "nothing", "dtype", "longer", "endless header"],
)
def test_damaged_files_are_known_as_such(folder: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=said):
        intarsia.load(folder)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-00009-of-00009.safetensors", "which is not in"),
        ("../model-00001-of-00003.safetensors", "no file of its folder"),
        ("/etc/passwd", "no file of its folder"),
        ("pytorch_model.bin", "from .safetensors files alone"),
        ("model-00001-of-0000N.safetensors", "says that it is in"),
    ],
)
def test_an_index_that_leads_astray_is_refused(sharded: Path, file: str, said: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, *others = sorted(index["weight_map"], key=lambda name: index["weight_map"][name])
    right = index["weight_map"][first]
    if "0000N" in file:  # another file that is there
        file = index["weight_map"][others[-1]]
    assert file != right
    index["weight_map"][first] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        intarsia.load(sharded)


def test_an_index_names_what_its_file_lacks(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.more"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.more is in .*: it is not"):
        intarsia.load(sharded)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        intarsia.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        intarsia.load(folder)


def test_options_that_mean_something_else_are_refused(folder: Path) -> None:
    for values, said in (
        ({"hidden_act": "gelu"}, "'gelu', and the model has no activation"),
        ({"attn_output_gate": False}, "without its output gate"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type is 'yarn'"),
        (
            {"layer_types": ["linear_attention", "chunked_attention", "linear_attention"]},
            "'chunked_attention'",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"model_type": "gpt2"}, "'gpt2', which is not read yet"),
        ({"model_type": "deepseek_v4"}, "'deepseek_v4', which is not read: .* in one softmax"),
        ({"logit_softcap": 30.0}, "logit_softcap = 30.0"),
    ):
        before = (folder / "config.json").read_text()
        configured(folder, **values)
        with pytest.raises(UnsupportedError, match=said):
            intarsia.load(folder)
        (folder / "config.json").write_text(before)
    configured(folder, logit_softcap=30.0)
    assert same_weights(intarsia.load(folder, ignore=["logit_softcap"]), small())
    configured(folder, hidden_size="wide")
    with pytest.raises(CheckpointError, match="hidden_size must be int"):
        intarsia.load(folder)


def test_the_text_model_of_a_larger_one(folder: Path) -> None:
    """As multimodal checkpoints have it: prefixed names, nested options, and much that is not of the text."""

    def wrapped(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)
        tensors["model.visual.blocks.0.weight"] = torch.ones(2, 3)
        tensors["mtp.layers.0.norm.weight"] = torch.ones(2)
        tensors["model.language_model.rotary_emb.inv_freq"] = torch.ones(2)

    changed(folder, wrapped)
    values = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": "qwen3_5",
        "text_config": values,
        "vision_config": {"depth": 2},
        "image_token_id": 7,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.warns(UserWarning, match=r"left out: the vision tower \(1 tensors\), layers that predict"):
        model = intarsia.load(folder)
    assert same_weights(model, small())


def test_a_tied_head_may_be_there_twice_if_it_is_the_same(tmp_path: Path) -> None:
    model = LanguageModel(small().config.replace(tie_embeddings=True))
    model.init_weights(0)
    intarsia.save(model, tmp_path)
    changed(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same_weights(intarsia.load(tmp_path), model)
    changed(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="ties the head"):
        intarsia.load(tmp_path)


def test_a_repository_is_found_in_the_cache_or_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="hf download some/model"):
        intarsia.load("some/model")
    with pytest.raises(CheckpointError, match="hf download some/model --revision v2"):
        intarsia.load("some/model@v2")
    with pytest.raises(CheckpointError, match="there is no folder /nowhere/at/all"):
        intarsia.load("/nowhere/at/all")
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cached / "snapshots" / "abc")
    assert same_weights(intarsia.load("some/model"), small())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, r"dtype is that of the parameters, .*torch.bfloat16, .*; got 'bfloat16'"),
        ({"dtype": torch.int8}, "got torch.int8"),
        ({"device": "gpu"}, "there is no device 'gpu' here"),
        ({"weights": "int3"}, "weights can be .*; got 'int3'"),
        ({"group": 32}, "give weights too"),
        ({"sparse": "yes"}, "sparse is .* or 'dense'; got 'yes'"),
        ({"ignore": "foo"}, r"ignore=\['foo'\]"),
    ],
)
def test_arguments_that_cannot_be(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        intarsia.load(folder, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "kimi-linear-tiny",
            "a preset's name, a model without weights, which `intarsia train kimi-linear-tiny` makes",
        ),
        ("https://huggingface.co/Qwen/Qwen3.5-0.8B/tree/main", "is named Qwen/Qwen3.5-0.8B"),
        ("nowhere", "as OWNER/NAME, a repository in Hugging Face's cache"),
    ],
)
def test_names_of_nothing_say_what_may_be_meant(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no folder {re.escape(name)}.*{re.escape(message)}"):
        intarsia.load(name)


def test_a_model_for_decoding_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save the LanguageModel"):
        intarsia.save(InferenceModel(small()), tmp_path / "x")  # type: ignore[arg-type]  # what a user may do
    with pytest.raises(UnsupportedError, match="did you mean 'qwen3_5'"):
        intarsia.save(small(), tmp_path / "x", "qwen")
    assert not (tmp_path / "x").exists()


def test_a_model_that_no_family_has_is_not_written(tmp_path: Path) -> None:
    config = small().config
    wider = AttentionConfig(3, 8, 1, rope=0.5)
    model = LanguageModel(config.replace(mixers={**config.mixers, "attention": wider}))
    model.init_weights(0)
    with pytest.raises(UnsupportedError, match="the mixer of layer 1"):
        intarsia.save(model, tmp_path / "x", "qwen3_5")
    with pytest.raises(UnsupportedError, match="'intarsia', this package's own format, holds all of them"):
        intarsia.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("layout", "nearest"),
    [
        ("gdn gdn gdn attention", "qwen3_5"),  # whose layers these are; something else differs
        ("gdn gdn gdn mla", "qwen3_5"),  # three layers of four are known there
        ("kda kda kda attention", "kimi_linear"),
        ("mamba2 mamba2 gla", "nemotron_h"),
    ],
)
def test_the_nearest_families_say_what_they_lack(layout: str, nearest: str) -> None:
    config = ModelConfig(
        vocab_size=64,
        d_model=64,
        depth=len(layout.split()),
        layout=layout,
        mixers={name: MIXERS[name] for name in set(layout.split())},
        feed_forward=FeedForwardConfig(64),
    )
    with pytest.raises(UnsupportedError) as caught:
        family_that_holds(config)
    told = re.findall(r"this model cannot be written as (\w+): ", str(caught.value))
    assert len(told) == 2
    assert told[0] == nearest  # and the second shares as many layers
    shared = [sum(kind in family(name).mixers for kind in config.layers) for name in told]
    assert shared[0] == shared[1] >= 2
    assert len(str(caught.value).splitlines()) == 4
    assert all(name in str(caught.value) for name in CHECKPOINTS)
