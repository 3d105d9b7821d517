"""Saved models come back as they were, and damaged ones do not come back at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intarsia.checkpoints.native import load_config, load_extra, load_model, save_model
from intarsia.errors import CheckpointError
from intarsia.files import sha256
from intarsia.model import LanguageModel, presets

VOCAB = 64


def make(name="kimi-linear-nano", seed=0, **changes):
    model = LanguageModel(presets.get(name, vocab_size=VOCAB, **changes))
    model.init_weights(seed)
    return model


def logits(model):
    tokens = torch.arange(2 * 9).view(2, 9) % VOCAB
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", make(), extra={"step": 7})
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["kimi-linear-nano", "gdn-hybrid-nano", "full-nano", "kimi-linear-tiny-moe"])
def test_round_trip(tmp_path, name, tie, dtype):
    model = make(name, tie_embeddings=tie).to(dtype)
    for block in model.blocks:
        if hasattr(block.feed_forward, "router"):
            block.feed_forward.router.bias.uniform_()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config == load_config(tmp_path)
    assert loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert (loaded.head.weight is loaded.embed.weight) == tie
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(logits(loaded), logits(model))
    stored = load_file(tmp_path / "model.safetensors")
    assert ("head.weight" in stored) == (not tie)


def test_a_loaded_model_can_be_trained_and_the_file_stays(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = load_model(saved)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    model(tokens, targets=tokens).nll.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert (saved / "model.safetensors").read_bytes() == before
    assert torch.equal(logits(load_model(saved)), logits(make()))


def test_another_dtype_and_device(saved):
    narrow = load_model(saved, dtype=torch.bfloat16)
    assert narrow.embed.weight.dtype == torch.bfloat16
    assert narrow.blocks[0].mixer.decay.A_log.dtype == torch.float32
    assert torch.equal(narrow.blocks[0].mixer.decay.A_log, make().blocks[0].mixer.decay.A_log)
    assert load_model(saved, device=torch.device("cpu")).embed.weight.device.type == "cpu"


def test_extra_and_overwriting(saved):
    assert load_extra(saved) == {"step": 7}
    (saved / "notes.txt").write_text("mine")
    save_model(saved, make("full-nano", seed=3), extra={"step": 8})
    assert load_extra(saved) == {"step": 8}
    assert torch.equal(logits(load_model(saved)), logits(make("full-nano", seed=3)))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


class Words:
    """A tokenizer as far as saving goes."""

    def save(self, directory: Path) -> None:
        (directory / "words.txt").write_text("a b c")


def test_tokenizer(saved):
    save_model(saved, make(), tokenizer=Words())
    save_model(saved, make(), tokenizer=Words())
    assert (saved / "tokenizer" / "words.txt").read_text() == "a b c"


class CrashError(Exception):
    pass


class Unsaveable:
    """A tokenizer that the power fails."""

    def save(self, directory: Path) -> None:
        (directory / "words.txt").write_text("a")
        raise CrashError


def test_a_crash_leaves_the_old_model(saved):
    save_model(saved, make(), tokenizer=Words())
    with pytest.raises(CrashError):
        save_model(saved, make(seed=9), tokenizer=Unsaveable())
    assert torch.equal(logits(load_model(saved)), logits(make()))
    assert (saved / "tokenizer" / "words.txt").read_text() == "a b c"
    with pytest.raises(CrashError):
        save_model(saved.parent / "new", make(seed=9), tokenizer=Unsaveable())
    assert list(saved.parent.iterdir()) == [saved]


def test_without_a_tokenizer_the_old_one_stays(saved):
    save_model(saved, make(), tokenizer=Words())
    save_model(saved, make(seed=9))
    assert torch.equal(logits(load_model(saved)), logits(make(seed=9)))
    assert (saved / "tokenizer" / "words.txt").read_text() == "a b c"


def edit(change):
    def apply(directory):
        values = json.loads((directory / "config.json").read_text())
        change(values)
        (directory / "config.json").write_text(json.dumps(values))

    return apply


def cut(directory):
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def flip(directory):
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (directory / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no model in .*: the directory is not there"),
        (lambda d: (d / "config.json").unlink(), "it has no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: (d / "config.json").write_text('{"format": '), "config.json is damaged or was cut off"),
        (lambda d: (d / "config.json").write_text("[]"), "does not describe an Intarsia model"),
        (edit(lambda v: v.update(format="llama")), "does not describe an Intarsia model"),
        (edit(lambda v: v.update(version=99)), "format version 99"),
        (edit(lambda v: v.pop("weights")), "damaged: weights"),
        (edit(lambda v: v.update(dtype="int8")), "damaged"),
        (edit(lambda v: v["model"].update(depth=0)), "no valid model: .*depth"),
        (edit(lambda v: v["model"].update(dephts=0)), "no valid model: .*did you mean 'depth'"),
        (edit(lambda v: v["model"].pop("layout")), "no valid model: .*layout"),
        (cut, "checksums differ"),
        (flip, "checksums differ"),
    ],
)
def test_damage(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(saved)
    assert str(saved) in str(error.value)


def rewrite(directory, change):
    """Change the tensors and make the checksum right, as other tools would."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    checksum = sha256(directory / "model.safetensors")
    edit(lambda values: values["weights"].update(sha256=checksum))(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update(other=torch.zeros(2)), "other does not belong there"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), "norm.weight is [3] and should be [128]"),
        (
            lambda t: t.update({"norm.weight": t["norm.weight"].half()}),
            "norm.weight is torch.float16 and should be torch.float32",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:9]], "9 tensors in all"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(saved)


def test_a_cut_file_without_verification(saved):
    cut(saved)
    with pytest.raises(CheckpointError, match="was cut off"):
        load_model(saved, verify=False)
