"""Hugging Face datasets, from directories: the library's own loading code, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.data import open_corpus
from intarsia.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    directory = tmp_path / "dataset"
    directory.mkdir()
    lines = [json.dumps({"text": f"record {number}", "number": number}) for number in range(100)]
    (directory / "train.jsonl").write_text("\n".join(lines))
    (directory / "test.jsonl").write_text('{"text": "of the test split", "number": 0}')
    return directory


def test_records_of_the_training_split_are_streamed(local: Path) -> None:
    corpus = open_corpus(f"hf:{local}", heldout=0.2)
    documents = list(corpus.documents())
    assert [document.text for document in documents] == [f"record {number}" for number in range(100)]
    assert 5 < sum(document.split == "heldout" for document in documents) < 40
    assert corpus.total_bytes() is None
    assert corpus.name == f"hf:{local}"
    assert len(list(open_corpus(f"hf:{local}", limit_bytes=90).documents())) == 11


def test_fingerprint_follows_the_files(local: Path) -> None:
    before = open_corpus(f"hf:{local}").fingerprint()
    assert before == open_corpus(f"hf:{local}").fingerprint()
    assert before != open_corpus(f"hf:{local}", limit_bytes=50).fingerprint()
    with (local / "train.jsonl").open("a") as file:
        file.write('\n{"text": "one more", "number": 100}')
    assert before != open_corpus(f"hf:{local}").fingerprint()


def test_saved_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"body": ["one", "two", "three"]})
    rows.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "odd")
    for name in ("single", "several"):
        corpus = open_corpus(f"hf:{tmp_path / name}", text_field="body")
        assert [document.text for document in corpus.documents()] == ["one", "two", "three"]
        assert corpus.fingerprint() == open_corpus(f"hf:{tmp_path / name}", text_field="body").fingerprint()
    with pytest.raises(DataError, match="no split 'train'; it has 'a', 'b'"):
        list(open_corpus(f"hf:{tmp_path / 'odd'}", text_field="body").documents())


def test_wrong_datasets(local: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the dataset 'nobody/nothing'"):
        list(open_corpus("hf:nobody/nothing").documents())
    with pytest.raises(DataError, match=r"cannot read .*BuilderConfig 'odd' not found"):
        open_corpus(f"hf:{local}:odd").fingerprint()
    with pytest.raises(DataError, match="no column 'body'; it has 'text', 'number'"):
        list(open_corpus(f"hf:{local}", text_field="body").documents())
    with pytest.raises(DataError, match="column 'number' is no text but int"):
        list(open_corpus(f"hf:{local}", text_field="number").documents())
