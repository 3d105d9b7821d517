"""Corpora: which documents, in which split, the same each time, and what is said about wrong input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data import Document, open_corpus, open_tokenizer
from intarsia.data.documents import assign_splits, text_hash
from intarsia.errors import DataError, IntarsiaError


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- splits -------------------------------------------------------------------------------------------


@given(st.sets(st.text(min_size=1), max_size=60), st.floats(0, 0.99))
def test_splits_follow_from_texts_alone(texts: set[str], heldout: float) -> None:
    texts = {text for text in texts if text.encode(errors="replace").decode() == text}

    def split(ordered: list[str]) -> dict[str, str]:
        pairs = [(text_hash(text), Document(text, text)) for text in ordered]
        return {document.text: document.split for document in assign_splits(pairs, heldout)}

    forward = split(sorted(texts))
    assert forward == split(sorted(texts, reverse=True))
    assert forward.keys() == texts
    held = sum(value == "heldout" for value in forward.values())
    if heldout * 2**64 < 1 or len(texts) < 2:
        assert held == 0
    else:
        assert 0 < held < len(texts)


def test_many_documents_are_split_in_the_proportion_asked_for() -> None:
    pairs = [(text_hash(str(number)), Document("", str(number))) for number in range(20_000)]
    held = sum(document.split == "heldout" for document in assign_splits(pairs, 0.1))
    assert 1800 < held < 2200


def test_a_new_file_moves_no_document_to_another_split(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    before = {document.id: document.split for document in open_corpus(tmp_path, heldout=0.2).documents()}
    (tmp_path / "new.txt").write_text("a new one")
    after = {document.id: document.split for document in open_corpus(tmp_path, heldout=0.2).documents()}
    assert before.items() < after.items()


# --- the Python corpus --------------------------------------------------------------------------------


def test_python_limit_is_a_mixed_part_and_the_same_each_time() -> None:
    corpus = open_corpus("python", limit_bytes=1_500_000)
    documents = list(corpus.documents())
    assert documents == list(open_corpus("python", limit_bytes=1_500_000).documents())
    assert 1_000_000 < sum(len(document.text.encode()) for document in documents) <= 1_500_000
    assert sum(document.source_bytes for document in documents) == corpus.total_bytes()
    assert len({document.text for document in documents}) == len(documents)
    assert len({document.id.split("/")[1] for document in documents}) > 10
    assert {document.split for document in documents} == {"train", "heldout"}
    assert not any("site-packages" in document.id or "/intarsia" in document.id for document in documents)
    held = list(corpus.documents("heldout"))
    assert held == [document for document in documents if document.split == "heldout"]
    smaller = open_corpus("python", limit_bytes=500_000)
    assert [document.text for document in smaller.documents()] == [
        document.text for document in documents[: len(smaller.files)]
    ]


def test_stdlib_corpus_does_not_depend_on_the_process() -> None:
    program = (
        "from intarsia.data import open_corpus;"
        "print(open_corpus('python-stdlib', limit_bytes=1_000_000).fingerprint())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    corpus = open_corpus("python-stdlib", limit_bytes=1_000_000)
    assert found == {corpus.fingerprint()}
    assert all(document.id.startswith("stdlib/") for document in corpus.documents())


def test_limits_and_shares_change_the_fingerprint() -> None:
    options: list[dict[str, float]] = [
        {"limit_bytes": 300_000},
        {"limit_bytes": 400_000},
        {"limit_bytes": 300_000, "heldout": 0.2},
    ]
    assert len({open_corpus("python-stdlib", **option).fingerprint() for option in options}) == 3


# --- files --------------------------------------------------------------------------------------------


def test_every_format_gives_its_texts(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    (tmp_path / "a.txt").write_text("plain té\r\nxt\n", newline="")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "notes.bin").write_bytes(b"\x00\x01 not looked at")
    (tmp_path / ".hidden.txt").write_text("hidden")
    write_lines(tmp_path / "c.jsonl", [{"text": "one", "x": 1}, {"text": None}, {"text": "two \ud83d\ude00"}])
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "packed \\ud800"}\n\n{"text": "packed too"}\n')
    parquet.write_table(arrow.table({"text": ["row", None, "row 2"]}), tmp_path / "e.parquet")
    with gzip.open(tmp_path / "f.txt.gz", "wt") as file:
        file.write("packed text")
    corpus = open_corpus(tmp_path)
    assert {document.id: document.text for document in corpus.documents()} == {
        "a.txt": "plain té\r\nxt\n",
        "b.md": "with a mark",
        "c.jsonl:1": "one",
        "c.jsonl:3": "two 😀",
        "d.jsonl.gz:1": "packed \ufffd",
        "d.jsonl.gz:3": "packed too",
        "e.parquet:0": "row",
        "e.parquet:2": "row 2",
        "f.txt.gz": "packed text",
    }
    total = corpus.total_bytes()
    assert total is not None
    assert 0.6 * total < sum(document.source_bytes for document in corpus.documents()) <= total


def test_patterns_lists_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.txt", "a/b/2.txt", "c/3.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text {name}")
    monkeypatch.chdir(tmp_path)
    assert {document.id for document in open_corpus("a/**/*.txt").documents()} == {"1.txt", "b/2.txt"}
    mixed = open_corpus(["a/1.txt", tmp_path / "c" / "3.log", "c/../a/1.txt"])
    assert sorted(document.id for document in mixed.documents()) == ["a/1.txt", "c/3.log"]
    (tmp_path / "odd[1].txt").write_text("a name with magic characters")
    assert [document.id for document in open_corpus("odd[1].txt").documents()] == ["odd[1].txt"]


def test_equal_and_empty_texts_are_left_out(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl", [{"text": text} for text in ("a", "b", "a", "", " \n", "c", "b")]
    )
    documents = list(open_corpus(path).documents())
    assert [document.text for document in documents] == ["a", "b", "c"]
    assert open_corpus(path).total_bytes() == path.stat().st_size


@given(
    st.text(alphabet="ab é漢😀\n", max_size=2000),
    st.integers(16, 300),
    st.booleans(),
)
def test_long_text_files_are_cut_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, mark: bool
) -> None:
    from intarsia.data.text_files import read_file

    path = tmp_path_factory.mktemp("cut") / "long.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    pieces = list(read_file(path, text_field="text", document_bytes=size))
    assert "".join(piece.text for piece in pieces) == text
    assert all(0 < len(piece.text.encode()) <= size for piece in pieces)
    assert sum(piece.source_bytes for piece in pieces) == (path.stat().st_size if pieces else 0)


def test_cuts_are_made_between_paragraphs_across_read_blocks(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "word " * (number % 40 + 1) + "\n\n" for number in range(30_000)]
    path = tmp_path / "book.txt"
    path.write_text("".join(paragraphs))
    assert path.stat().st_size > 3 << 20
    documents = list(open_corpus(path, document_bytes=4096).documents())
    assert "".join(document.text for document in documents) == "".join(paragraphs)
    assert all(document.text.endswith("\n\n") for document in documents)
    assert documents[1].id == f"book.txt@{len(documents[0].text)}"


def test_limit_takes_a_share_of_every_large_file(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_lines(
            tmp_path / f"{name}.jsonl", [{"text": f"{name} {number} " + "x" * 90} for number in range(200)]
        )
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(f"small {number} " + "y" * 190)
    corpus = open_corpus(tmp_path, limit_bytes=16_000)
    documents = list(corpus.documents())
    assert 13_000 < sum(len(document.text) for document in documents) <= 16_000
    for start in ("a ", "b ", "c ", "small "):
        assert sum(document.text.startswith(start) for document in documents) > 10
    assert documents == list(open_corpus(tmp_path, limit_bytes=16_000).documents())
    assert len(list(open_corpus(tmp_path, limit_bytes=10**9).documents())) == 700


def test_limited_training_documents_are_training_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": f"text {number}"} for number in range(300)])
    for heldout in (0.001, 0.05, 0.5):
        corpus = open_corpus(path, heldout=heldout)
        everything = {document.text for document in corpus.documents("train")}
        for limit in (20, 100, 1000):
            assert {document.text for document in corpus.limited(limit).documents("train")} <= everything


def test_changed_files_change_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")
    before = open_corpus(path).fingerprint()
    assert before == open_corpus(path).fingerprint() == open_corpus(tmp_path).fingerprint()
    assert before != open_corpus(path, text_field="body").fingerprint()
    path.write_text("after it")
    assert before != open_corpus(path).fingerprint()


def test_a_binary_file_in_a_directory_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("gru\xdf".encode("latin-1"))
    assert [document.text for document in open_corpus(tmp_path).documents()] == ["good"]
    assert "latin.txt is not UTF-8 text (byte 3 is 0xdf)" in caplog.text
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        list(open_corpus(tmp_path / "*.txt").documents())


# --- wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl, line 2 is not valid JSON"),
        ("x.jsonl", b'\n\n["text"]\n', "line 3 is a JSON list; one JSON object a line is wanted"),
        ("x.json", b'[\n{"text": "a"}\n]', "one JSON object a line is wanted"),
        ("x.jsonl", b'{"body": "a", "id": 3}\n', "has no field 'text'; it has 'body', 'id'"),
        ("x.jsonl", b'{"text": 3}\n', "the field 'text' is no text but int"),
        ("x.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("x.jsonl", b"[" * 100_000 + b"\n", "nested too deeply|not valid JSON"),
        ("x.jsonl", b"\n\n", "holds no text"),
        ("x.jsonl.gz", b"not packed", "is no complete gzip file"),
        ("x.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-12], "is no complete gzip file"),
        ("x.jsonl.zst", b"", "is packed as .zst, which is not read"),
        ("x.parquet", b"PAR1 but not really", "is no Parquet file"),
        ("x.txt", b"", "holds no text"),
        ("x.txt", b"a\0b", "has a zero byte at 1"),
        ("x.dat", b"ok \xff", r"byte 3 is 0xff"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(tmp_path / name).documents())


def test_bad_parquet_columns(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"body": ["a"], "count": [1]}), path)
    with pytest.raises(DataError, match="has no column 'text'; it has 'body', 'count'"):
        list(open_corpus(path).documents())
    with pytest.raises(DataError, match="column 'count' is no text but int64"):
        list(open_corpus(path, text_field="count").documents())
    assert [document.text for document in open_corpus(path, text_field="body").documents()] == ["a"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/at/all.txt", {}, "no file or directory 'nowhere/at/all.txt'"),
        ("nowhere/*.txt", {}, r"no file matches 'nowhere/\*.txt'"),
        ("", {}, "path of a corpus is empty"),
        ([], {}, "no files were named"),
        ("/dev/null", {}, "neither a file nor a directory"),
        ("hf:", {}, "wants the name of a dataset"),
        ("python", {"limit_bytes": 0}, "limit_bytes must be positive"),
        ("python", {"limit_bytes": -5}, "limit_bytes must be positive"),
        ("python", {"heldout": 1.0}, "at least 0 and below 1"),
        ("python", {"heldout": -0.1}, "at least 0 and below 1"),
        ("python", {"heldout": float("nan")}, "at least 0 and below 1"),
        (".", {"document_bytes": 1}, "document_bytes must be at least 16"),
    ],
)
def test_bad_sources(source: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(IntarsiaError, match=message):
        open_corpus(source, **options)


def test_a_limit_below_every_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("longer than five")
    with pytest.raises(DataError, match="limit_bytes=5"):
        list(open_corpus(tmp_path, limit_bytes=5).documents())
    with pytest.raises(DataError, match="'train' or 'heldout'"):
        open_corpus(tmp_path).documents("test")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
@pytest.mark.parametrize("source", ["x.txt", "x.jsonl", "."])
def test_an_empty_corpus_needs_text_and_no_other_limit(tmp_path: Path, source: str, content: bytes) -> None:
    (tmp_path / source if source != "." else tmp_path / "x.md").write_bytes(content)
    with pytest.raises(DataError, match="holds no text"):
        list(open_corpus(tmp_path / source, limit_bytes=1000).documents())
    with pytest.raises(DataError, match="holds no text"):
        open_tokenizer("bpe:300", corpus=open_corpus(tmp_path / source), directory=tmp_path / "cache")


def test_a_limit_below_every_python_file() -> None:
    with pytest.raises(DataError, match="limit_bytes=5"):
        list(open_corpus("python-stdlib", limit_bytes=5).documents())


def test_a_directory_without_text(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="holds no text"):
        open_corpus(tmp_path)
