"""Tokenizers: every text comes back, whole and in pieces, and after saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from intarsia.data import Corpus, Tokenizer, load_tokenizer, open_corpus, open_tokenizer
from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.data.fast_tokenizer import FastByteLevelTokenizer, FastTokenizer, byte_alphabet
from intarsia.data.tokenizer_base import SEPARATOR
from intarsia.errors import DataError

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab 012\n\té漢😀"))
) | st.sampled_from([SEPARATOR, f"a{SEPARATOR}b", "don't\r\n\r\n    x = 12345", "👩‍👩‍👧", " " * 50])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return open_corpus("python-stdlib", limit_bytes=400_000)


@pytest.fixture(scope="module")
def bpe(corpus: Corpus) -> Tokenizer:
    return open_tokenizer("bpe:600", corpus=corpus)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Tokenizer:
    """A tokenizer in the manner of Llama 2: spaces as "▁", unknown characters as byte tokens."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator([document.text for document in corpus.documents("train")][:20], trainer)
    directory = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(directory / "tokenizer.json"))
    content = json.loads((directory / "tokenizer.json").read_text())
    # The bytes are ordinary tokens of the vocabulary, as in the published files.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return open_tokenizer(f"hf:{directory}")


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.separator not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.encode_batch(["x", text]) == [tokenizer.encode("x"), ids]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.separator, *ids, tokenizer.separator]) == text
    stream = tokenizer.decode_stream()
    pieces = [stream.push(token) for token in [tokenizer.separator, *ids]]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(TEXTS)
def test_bytes_round_trip(text: str) -> None:
    check_round_trip(ByteTokenizer(), text)


@given(TEXTS)
def test_bpe_round_trip(bpe: Tokenizer, text: str) -> None:
    check_round_trip(bpe, text)


@given(TEXTS)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str) -> None:
    if text:  # this kind puts a space in front of an empty text
        check_round_trip(sentencepiece, text)


@given(st.binary())
def test_any_bytes_round_trip(content: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content
    assert tokenizer.decode(tokenizer.encode_bytes(content)) == content.decode(errors="replace")


@given(st.data())
def test_streams_of_any_tokens_end_as_decode_does(bpe: Tokenizer, data: st.DataObject) -> None:
    """A model writes what it likes, halves of characters included."""
    for tokenizer in (ByteTokenizer(), bpe):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
        stream = tokenizer.decode_stream()
        for _ in range(2):  # finish() leaves it as new
            assert "".join([stream.push(token) for token in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_streams_wait_for_whole_characters() -> None:
    tokenizer = ByteTokenizer()
    stream = tokenizer.decode_stream()
    assert [stream.push(token) for token in "a😀".encode()] == ["a", "", "", "", "😀"]
    stream.push("é".encode()[0])
    assert stream.finish() == "\ufffd"


def test_lone_surrogates_are_replaced(bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_byte_alphabet_is_the_librarys() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == [bytes([byte]) for byte in range(256)]


def test_bpe_is_the_same_in_every_process(bpe: Tokenizer, corpus: Corpus) -> None:
    assert isinstance(bpe, FastByteLevelTokenizer)
    assert bpe.vocab_size == 600
    assert bpe.separator == 0
    program = (
        "from intarsia.data import *;"
        "print(open_tokenizer('bpe:600', corpus=open_corpus('python-stdlib', "
        "limit_bytes=400_000)).fingerprint())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == bpe.fingerprint()


def test_bpe_is_trained_once(tmp_path: Path, bpe: Tokenizer, corpus: Corpus) -> None:
    first = open_tokenizer("bpe:600", corpus=corpus, directory=tmp_path)
    (kept,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    before = (kept / "tokenizer.json").stat().st_mtime_ns
    second = open_tokenizer("bpe:600", corpus=corpus, directory=tmp_path)
    assert (kept / "tokenizer.json").stat().st_mtime_ns == before
    assert first.fingerprint() == second.fingerprint() == bpe.fingerprint()
    assert first.name == "bpe:600"
    open_tokenizer("bpe:601", corpus=corpus, directory=tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_bpe_never_reads_held_out_documents(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"word{number} " * 50)
    corpus = open_corpus(tmp_path, heldout=0.3)
    held = [document.text for document in corpus.documents("heldout")]
    tokenizer = open_tokenizer("bpe:2000", corpus=corpus)
    assert tokenizer.vocab_size < 2000  # and this is logged
    for document in corpus.documents("train"):
        assert len(tokenizer.encode(document.text)) <= 101
    assert held
    assert all(len(tokenizer.encode(text)) >= 99 for text in held)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_saving(tmp_path: Path, kind: str, request: pytest.FixtureRequest, corpus: Corpus) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "deep" / "tokenizer")
    assert type(loaded) is type(tokenizer)
    for name in ("name", "vocab_size", "separator"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    text = next(corpus.documents("heldout")).text + SEPARATOR
    assert loaded.encode(text) == tokenizer.encode(text)


def test_fingerprints_differ(bpe: Tokenizer, sentencepiece: Tokenizer, corpus: Corpus) -> None:
    others = [ByteTokenizer(), bpe, sentencepiece, open_tokenizer("bpe:599", corpus=corpus)]
    assert len({tokenizer.fingerprint() for tokenizer in others}) == len(others)


def test_separator_of_a_foreign_tokenizer(tmp_path: Path, sentencepiece: Tokenizer) -> None:
    assert type(sentencepiece) is FastTokenizer
    assert sentencepiece.separator == 2
    # Without a configuration, the usual spellings are looked for ...
    backend = Backend(models.WordLevel({"a": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(f"hf:{tmp_path}").separator == 1
    # ... and without one of those, a separator is added.
    Backend(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    added = open_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}")
    assert (added.separator, added.vocab_size) == (2, 3)
    Backend(models.WordLevel({"a": 0, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no end-of-text token, and '<.endoftext.>' cannot be added"):
        open_tokenizer(f"hf:{tmp_path}")
    # A separator declared as an ordinary token does not come out of a text either.
    backend = Backend(models.BPE({"a": 0, "<": 1, "/": 2, "s": 3, ">": 4}, []))
    backend.add_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    ordinary = open_tokenizer(f"hf:{tmp_path}")
    assert ordinary.separator == 5
    assert ordinary.encode("a</s>a") == [0, 1, 2, 3, 4, 0]


def test_transformers_tokenizers_without_a_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = open_tokenizer(f"hf:{tmp_path}")
    ids = tokenizer.encode("hello worlds!")
    assert ids == [5, 6, 7, 8]
    assert tokenizer.separator == 9
    assert tokenizer.vocab_size == 10
    assert tokenizer.decode([9, *ids]).replace(" !", "!") == "hello worlds!"
    stream = tokenizer.decode_stream()
    assert "".join([stream.push(token) for token in ids] + [stream.finish()]).startswith("hello worlds")
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.encode("hello worlds!") == ids
    assert (loaded.separator, loaded.vocab_size) == (9, 10)


def test_saved_bpe_loads_in_transformers(tmp_path: Path, bpe: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "def f(x):\n    return x  # 12345 é"
    assert theirs(text, add_special_tokens=False)["input_ids"] == bpe.encode(text)
    assert theirs.eos_token_id == bpe.separator


def test_saved_bytes_load_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (
        "def f(x):\n\treturn x  # 12345 é",
        "",
        " ",
        "多 種\u0000\U0001f600",
        "".join(map(chr, range(400))),
    ):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.separator, ours.vocab_size)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "there is no tokenizer 'words'; there are 'bytes', 'bpe:SIZE'"),
        ("", "there is no tokenizer ''"),
        ("hf:", "there is no tokenizer 'hf:'"),
        ("bytes:3", "there is no tokenizer 'bytes:3'"),
        ("bpe", "such as 'bpe:4096'"),
        ("bpe:many", "such as 'bpe:4096'"),
        ("bpe:-5", "such as 'bpe:4096'"),
        ("bpe:100", "at least 257 .* not 100"),
        ("hf:./not/there", "no tokenizer at ./not/there"),
        ("hf:/not/there", "no tokenizer at /not/there"),
    ],
)
def test_wrong_names(name: str, message: str, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_tokenizer(name, corpus=corpus, directory=tmp_path)


def test_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="trained on a corpus, and none was given"):
        open_tokenizer("bpe:512")
    with pytest.raises(DataError, match="there is no directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot open the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match=r"has tokenizer_config.json, but no tokenizer.json .*Copy its files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer that the tokenizers library knows"):
        load_tokenizer(tmp_path)
    (tmp_path / "intarsia.json").write_text('{"kind": "future"}')
    with pytest.raises(DataError, match="later version"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot open the tokenizer 'nobody/nothing'"):
        open_tokenizer("hf:nobody/nothing")


@pytest.mark.parametrize("token", [-1, 257, 10**9])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(DataError, match=f"token {token} is not in the vocabulary of 'bytes'"):
        ByteTokenizer().decode([token])
    with pytest.raises(DataError, match="not in the vocabulary"):
        ByteTokenizer().decode_stream().push(token)
