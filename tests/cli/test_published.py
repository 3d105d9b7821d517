"""The verbs on models that others have published."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia
from intarsia.model import LanguageModel, presets
from support.checkpoint_cases import CASES, their_folder

Cli = Callable[..., Any]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi Linear with a tokenizer, as a repository has them. Not to be written to."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    case = next(case for case in CASES if case.family == "kimi_linear")
    folder = their_folder(case, tmp_path_factory.mktemp("published"))
    words = [
        *"abcdefghijklmnopqrstuvwxyz .,0123456789()[]{}<>=+-*/",
        "one",
        "two",
        "<|end|>",
        "<|stop|>",
        "x1",
        "x2",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words[:61])}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    conduct = {
        "eos_token_id": [words.index("<|end|>"), words.index("<|stop|>")],
        "temperature": 0.5,
        "top_p": 0.9,
    }
    (folder / "generation_config.json").write_text(json.dumps(conduct))
    return folder


def test_inspect(cli: Cli, published: Path) -> None:
    facts = json.loads(cli("inspect", published, "--json").out)
    assert facts["layers"] == ["kda", "mla", "kda", "mla"]
    parameters = sum(p.numel() for p in intarsia.load(published).parameters())
    assert facts["parameters"] == sum(facts["parameters_by_part"].values()) == parameters
    assert facts["weight_bytes"] == {"bfloat16": 2 * parameters}  # all too small to be packed
    shown = cli("inspect", published).out
    assert "░█░█  ░ kda, █ mla" in shown
    assert re.search(r"weights in bfloat16 +[\d.]+ KiB: fits here with 1,048,576 tokens", shown)


def test_exam(cli: Cli, published: Path) -> None:
    from intarsia.tasks import examine, make_task

    found = json.loads(cli("exam", published, "--tasks", "parity:length=9", "--json").out)["exams"][0]
    answers = examine(intarsia.load(published), make_task("parity", {"length": 9}))
    assert found["answers"]["right"] == answers.score.right_tokens
    assert found["chance"] == 0.5
    told = cli("exam", published, "--tasks", "ruler-vt:length=900,hops=1", "--examples", 2, "--show", 1)
    assert told.status == 0, told.err
    assert "ruler-vt:length=900,hops=1" in told.out
    assert "\n  asked " in told.out
    refused = cli("exam", published, "--tasks", "mqar:length=64")
    assert refused.status == 2
    assert "different tokens and the model" in refused.err


def test_generate(cli: Cli, published: Path) -> None:
    done = cli("generate", published, "one two", "-n", 4, "--json")
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    # Nothing is put before the prompt: its files name no token for that.
    assert facts["prompt_tokens"] == 2
    assert (
        json.loads(cli("generate", published, "one two", "-n", 4, "--json", "--weights", "int8").out)[
            "tokens"
        ]
        > 0
    )


def test_generation_config_is_heeded(published: Path, tmp_path: Path) -> None:
    from intarsia.data.published import conduct_of
    from intarsia.errors import DataError

    conduct = conduct_of(published)
    assert (len(conduct.stop), conduct.temperature, conduct.top_p, conduct.begin) == (2, 0.5, 0.9, ())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "bos_token_id": 4}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert (conduct_of(tmp_path).stop, conduct_of(tmp_path).begin) == ({3}, (4,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": "x"}))
    with pytest.raises(DataError, match="eos_token_id must be a token's number"):
        conduct_of(tmp_path)


def test_convert_there_and_back(cli: Cli, published: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert cli("convert", published, ours, "--to", "intarsia").status == 0
    assert cli("inspect", ours, "--json").status == 0
    done = cli("convert", ours, theirs, "--to", "kimi")
    assert done.status == 0, done.err
    assert "as kimi_linear" in done.err
    assert (theirs / "tokenizer.json").is_file()
    assert json.loads((theirs / "config.json").read_text())["linear_attn_config"]["full_attn_layers"] == [
        2,
        4,
    ]
    first, again = (intarsia.load(x).state_dict() for x in (published, theirs))
    assert all((again[name] == tensor).all() for name, tensor in first.items())
    assert intarsia.load_tokenizer(theirs).encode("one two") == intarsia.load_tokenizer(published).encode(
        "one two"
    )
    done = cli("convert", ours, theirs)
    assert done.status == 2
    assert "there is a model in" in done.err
    assert cli("convert", published, theirs, "--overwrite", "--dtype", "bfloat16").status == 0
    values = json.loads((theirs / "config.json").read_text())
    assert (values["dtype"], values["eos_token_id"]) == ("bfloat16", 1)


def test_packed_weights_in_files(
    cli: Cli, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written once, then inspected and run as they are, with the bytes that they have."""
    packed, large = tmp_path / "packed", tmp_path / "large"
    refused = cli("convert", published, packed, "--to", "intarsia", "--weights", "int8")
    assert refused.status == 2
    assert "no weight of this model has 65,536 numbers" in refused.err
    assert not packed.exists()
    model = LanguageModel(presets.get("qwen3-next-tiny", vocab_size=1024)).to(torch.bfloat16)
    model.init_weights(0)
    intarsia.save(model, large)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(published / name, large / name)
    foreseen = json.loads(cli("inspect", large, "--json").out)["weight_bytes"]
    assert list(foreseen) == ["bfloat16", "int8", "int4"]
    assert foreseen["int8"] < foreseen["bfloat16"]
    published = large
    done = cli("convert", published, packed, "--to", "intarsia", "--weights", "int8")
    assert done.status == 0, done.err
    assert "as intarsia, packed to int8" in done.err
    facts = json.loads(cli("inspect", packed, "--json").out)
    assert facts["weight_bytes"]["int8"] == foreseen["int8"]
    size = (packed / "model.safetensors").stat().st_size
    assert 0.8 * size < facts["weight_bytes"]["int8"] < size
    assert (facts["packed"], list(facts["weight_bytes"])) == ("int8", ["int8"])
    assert "as they are packed in its files" in " ".join(cli("inspect", packed).out.split())
    texts = [
        json.loads(cli("generate", *which, "one two", "-n", 6, "--greedy", "--json").out)
        for which in ([packed], [published, "--weights", "int8"], [packed, "--weights", "int8"])
    ]
    assert texts[0]["text"] == texts[1]["text"] == texts[2]["text"]
    assert texts[0]["weight_bytes"] == texts[1]["weight_bytes"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    said = cli("chat", packed, "--plain", "--greedy", "-n", 3)
    assert said.status == 0, said.err
    for wrong, message in (
        (("generate", packed, "one", "--weights", "int4"), "packed to int8 and cannot become int4"),
        (("convert", packed, tmp_path / "out"), "the model that they were packed from"),
        (("convert", published, tmp_path / "out", "--weights", "int8"), "--to intarsia"),
        (("convert", published, tmp_path / "out", "--to", "intarsia", "--weights", "int3"), "int8 or int4"),
        (("convert", published, tmp_path / "out", "--to", "intarsa"), "'intarsa'; did you mean 'intarsia'?"),
    ):
        done = cli(*wrong)
        assert done.status == 2
        assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_says_so(cli: Cli, tmp_path: Path) -> None:
    """And none is made of nothing: transformers makes some that know no token."""
    case = next(case for case in CASES if case.family == "qwen3_5")
    folder = their_folder(case, tmp_path / "bare")
    done = cli("generate", folder, "one")
    assert done.status == 2
    assert "bare': the folder holds none" in done.err
    assert cli("convert", folder, tmp_path / "ours", "--to", "intarsia").status == 0
    assert "a model without a tokenizer" in cli("generate", tmp_path / "ours", "one").err
    (folder / "generation_config.json").unlink()
    assert cli("convert", folder, tmp_path / "ours2", "--to", "intarsia").status == 0
    assert not (tmp_path / "ours2" / "tokenizer").exists()
    assert "a model without a tokenizer" in cli("generate", tmp_path / "ours2", "one").err
    (folder / "rwkv_vocab_v20230424.txt").write_text("1 '\\x00' 1\n")
    assert "no token for the byte 0x01" in cli("chat", folder).err


def test_sparse_layers_are_dense_where_it_is_said(cli: Cli, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.sparse == "dense")
    folder = their_folder(case, tmp_path)
    out = tmp_path / "out"
    for verb in (("inspect", folder), ("convert", folder, out, "--to", "intarsia")):
        done = cli(*verb, "--sparse", "thin")
        assert done.status == 2
        assert "it can be dense" in done.err
        done = cli(*verb, "--sparse", "dense")
        assert done.status == 0, done.err
    assert cli("inspect", out).status == 0


def test_a_tokenizer_beside_the_model_is_its_own_too(cli: Cli, published: Path, tmp_path: Path) -> None:
    """Where transformers, and what trains its models, saves one with a model in our own format."""
    ours = tmp_path / "ours"
    assert cli("convert", published, ours, "--to", "intarsia").status == 0
    expected = json.loads(cli("generate", ours, "one two", "-n", 4, "--greedy", "--json").out)
    for file in (ours / "tokenizer").iterdir():
        file.rename(ours / file.name)
    (ours / "tokenizer").rmdir()
    done = cli("generate", ours, "one two", "-n", 4, "--greedy", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["text"] == expected["text"]
    assert cli("convert", ours, tmp_path / "theirs", "--to", "kimi").status == 0
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()


def test_a_model_that_was_trained_here_goes_out(cli: Cli, trained: Path, tmp_path: Path) -> None:
    """Without experts, and with a head that is its embedding: transformers has the same logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = cli("convert", trained, tmp_path / "out", "--to", "kimi")
    assert done.status == 0, done.err
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("más").input_ids == list("más".encode())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 256
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours = intarsia.load(trained / "model")(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits.float(), ours.float(), rtol=1e-4, atol=1e-4)


def test_what_is_missing_is_to_be_downloaded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for verb in ("inspect", "generate"):
        done = cli(verb, "Qwen/Qwen3.5-0.8B")
        assert done.status == 2
        assert "hf download Qwen/Qwen3.5-0.8B" in done.err
