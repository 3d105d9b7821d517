"""Preparing a dataset: made once, wholly or not at all, whatever happens in between."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from intarsia.data import TokenDataset, load_tokenizer, open_corpus, open_tokenizer, prepare
from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.errors import DataError

TEXTS = [f"document {number} " * (number % 17 + 1) for number in range(400)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def directories(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.exists() else []


def prepare_elsewhere(source: Path, place: Path, before: str = "") -> subprocess.Popen[str]:
    program = (
        "import sys, time\n"
        "from intarsia.data import open_corpus, open_tokenizer, prepare\n"
        "from intarsia.data.byte_tokenizer import ByteTokenizer\n"
        f"{before}\n"
        "try:\n"
        "    dataset = prepare(open_corpus(sys.argv[1]), ByteTokenizer(), sys.argv[2], progress=False)\n"
        "    print(dataset.fingerprint)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(place)], stdout=subprocess.PIPE, text=True
    )


def test_everything_is_written_and_described(source: Path, tmp_path: Path) -> None:
    corpus = open_corpus(source, heldout=0.1)
    tokenizer = open_tokenizer("bpe:400", corpus=corpus)
    dataset = prepare(corpus, tokenizer, tmp_path / "data")
    for split, name in ((dataset.train, "train"), (dataset.heldout, "heldout")):
        texts = [document.text for document in corpus.documents(name)]
        assert [tokenizer.decode(tokens) for tokens in split] == texts
        assert split.text_bytes.tolist() == [len(text.encode()) for text in texts]
        assert split.document(0).dtype == np.uint16
        assert isinstance(split.document(0).base, np.memmap)
        assert split.document(0)[0] == tokenizer.separator
    assert dataset.vocab_size == tokenizer.vocab_size
    assert dataset.corpus == str(source)
    assert dataset.tokenizer == "bpe:400"
    again = TokenDataset(dataset.directory)
    assert again.fingerprint == dataset.fingerprint
    assert load_tokenizer(dataset.directory / "tokenizer").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        dataset.train.document(0)[0] = 1


def test_large_vocabularies_take_four_bytes(source: Path, tmp_path: Path) -> None:
    class WideTokenizer(ByteTokenizer):
        vocab_size = 1 << 17
        separator = (1 << 17) - 1

        def encode_arrays(self, texts, dtype):
            return [tokens + np.array(1 << 16, dtype) for tokens in super().encode_arrays(texts, dtype)]

    dataset = prepare(open_corpus(source), WideTokenizer(), tmp_path / "data", progress=False)
    assert dataset.train.document(0).dtype == np.uint32
    assert dataset.train.document(0)[0] == (1 << 17) - 1
    assert bytes((dataset.train.document(5)[1:] - (1 << 16)).astype(np.uint8)).decode() in TEXTS


def test_reused_while_the_fingerprints_match(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "data"

    def prepared(**options: object) -> Path:
        return prepare(open_corpus(source, **options), ByteTokenizer(), place, progress=False).directory

    first = prepared()
    inode = (first / "train.tokens").stat().st_ino
    assert prepared() == first
    assert (first / "train.tokens").stat().st_ino == inode
    others = {first, prepared(heldout=0.2), prepared(limit_bytes=5000)}
    corpus = open_corpus(source)
    others.add(prepare(corpus, open_tokenizer("bpe:300", corpus=corpus), place, progress=False).directory)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    others.add(prepared())
    assert directories(place) == sorted(others)
    assert len(others) == 5


def test_fingerprint_is_of_the_content(source: Path, tmp_path: Path) -> None:
    first = prepare(open_corpus(source), ByteTokenizer(), tmp_path / "a", progress=False)
    os.utime(source, (1, 1))
    second = prepare(open_corpus(source), ByteTokenizer(), tmp_path / "b", progress=False)
    assert first.directory.name != second.directory.name
    assert first.fingerprint == second.fingerprint
    third = prepare(open_corpus(source, limit_bytes=5000), ByteTokenizer(), tmp_path / "b", progress=False)
    assert third.fingerprint != first.fingerprint


def test_killed_in_the_middle(tmp_path: Path) -> None:
    source, place = tmp_path / "source.jsonl", tmp_path / "data"
    with source.open("w") as file:
        for number in range(40_000):
            file.write(json.dumps({"text": f"{number} " * 100}) + "\n")
    for _ in range(2):
        process = prepare_elsewhere(source, place)
        deadline = time.monotonic() + 60
        written: list[Path] = []
        while not written and time.monotonic() < deadline:
            written = [
                path for path in place.glob(".*.partial-*/train.tokens") if path.stat().st_size > 1 << 20
            ]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        (remainder,) = directories(place)  # the one before has been removed
        assert remainder == written[0].parent
        assert remainder.name.startswith(".")
        with pytest.raises(DataError, match="holds no prepared dataset"):
            TokenDataset(remainder)
    dataset = prepare(open_corpus(source), ByteTokenizer(), place, progress=False)
    assert directories(place) == [dataset.directory]
    untouched = prepare(open_corpus(source), ByteTokenizer(), tmp_path / "other", progress=False)
    assert dataset.fingerprint == untouched.fingerprint
    for name in ("train.tokens", "train.offsets", "heldout.tokens", "heldout.bytes", "dataset.json"):
        assert (dataset.directory / name).read_bytes() == (untouched.directory / name).read_bytes()


def test_interrupted_or_failing_leaves_nothing(source: Path, tmp_path: Path) -> None:
    class Interrupting(ByteTokenizer):
        error: BaseException = KeyboardInterrupt()

        def encode_arrays(self, texts, dtype):
            raise self.error

    place = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare(open_corpus(source), Interrupting(), place, progress=False)
    assert directories(place) == []
    with source.open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(DataError, match="line 401 is not valid JSON"):
        prepare(open_corpus(source), ByteTokenizer(), place, progress=False)
    assert directories(place) == []


def test_several_processes_at_once(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "data"
    # Whoever is first takes half a second, so that the others come meanwhile.
    slow = (
        "save = ByteTokenizer.save\n"
        "def wait(*args):\n"
        "    print('works'); time.sleep(0.5); save(*args)\n"
        "ByteTokenizer.save = wait\n"
    )
    processes = [prepare_elsewhere(source, place, slow) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(len(output) for output in outputs) == [1, 1, 2]
    dataset = prepare(open_corpus(source), ByteTokenizer(), place, progress=False)
    assert {output[-1] for output in outputs} == {dataset.fingerprint}
    assert directories(place) == [dataset.directory]


def test_damaged_files_are_noticed_and_made_again(source: Path, tmp_path: Path) -> None:
    dataset = prepare(open_corpus(source), ByteTokenizer(), tmp_path / "data", progress=False)
    tokens = dataset.directory / "train.tokens"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=rf"damaged: .*train.tokens has {len(whole) - 2} bytes instead of {len(whole)}"
    ):
        TokenDataset(dataset.directory)
    tokens.unlink()
    with pytest.raises(DataError, match=r"train\.tokens is missing"):
        TokenDataset(dataset.directory)
    assert prepare(open_corpus(source), ByteTokenizer(), tmp_path / "data", progress=False).train.tokens
    assert tokens.read_bytes() == whole
    meta = dataset.directory / "dataset.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="another version"):
        TokenDataset(dataset.directory)
    meta.write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        TokenDataset(dataset.directory)


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    output, _ = prepare_elsewhere(source, tmp_path / "data", limit).communicate(timeout=60)
    assert output.startswith("DataError the disk is full (File too large) while writing to")
    assert directories(tmp_path / "data") == []


def test_a_place_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    for place in (source, source / "below", Path("/proc/intarsia")):
        with pytest.raises(DataError, match=r"cannot write to|writing to .* failed"):
            prepare(open_corpus(source), ByteTokenizer(), place, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    with pytest.raises(DataError, match="choose another directory"):
        prepare(open_corpus(source), ByteTokenizer(), place, progress=False)


def test_splits_must_not_be_empty(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a single short document")
    with pytest.raises(DataError, match="single document, so nothing can be held out"):
        prepare(open_corpus(tmp_path / "x.txt"), ByteTokenizer(), tmp_path / "data", progress=False)
    dataset = prepare(
        open_corpus(tmp_path / "x.txt", heldout=0), ByteTokenizer(), tmp_path / "data", progress=False
    )
    assert (dataset.train.documents, dataset.heldout.documents, dataset.heldout.tokens) == (1, 0, 0)
    assert list(dataset.heldout) == []


def test_no_dataset_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no prepared dataset"):
            TokenDataset(place)


def test_progress_goes_to_the_standard_error(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(open_corpus(source), ByteTokenizer(), tmp_path / "data")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Tokenising" in shown.err
    prepare(open_corpus(source), ByteTokenizer(), tmp_path / "data")
    assert capfd.readouterr().err == ""
