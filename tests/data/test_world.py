"""RWKV's tokenizer: a vocabulary as it is published, and texts beside a search through all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import intarsia
from intarsia.data import load_tokenizer
from intarsia.data.world_tokenizer import WorldTokenizer, load_world_tokenizer
from intarsia.errors import DataError

WORDS = (
    "the", " the", "then", "th", "\n\n", "\r\n", "  ", "    ", "'", "''", '"', "\\", "\\n", "中", "中文", "文字", "é",
    "User", "User:", "\u2028", "\x85", "😀", "of", " of the", " of", "aa", "aaaa", "aaaaaaaa",
)  # fmt: skip
PIECES = ("中".encode()[:2], "😀".encode()[1:3], b"\xff\xfe", "é".encode()[1:] + b"n")
"""Tokens that are no text of their own."""


def vocabulary() -> dict[bytes, int]:
    """Single bytes from 1 on, as published, and some tokens of several."""
    tokens = {bytes([byte]): byte + 1 for byte in range(256)}
    longer = dict.fromkeys([*(word.encode() for word in WORDS), *PIECES])
    return {**tokens, **{content: 300 + n for n, content in enumerate(longer) if len(content) > 1}}


def published(folder: Path, tokens: dict[bytes, int] | None = None) -> Path:
    """The file: what is a text stands as one, the rest as bytes."""
    lines = []
    for content, token in (vocabulary() if tokens is None else tokens).items():
        try:
            lines.append(f"{token} {content.decode()!r} {len(content)}\n")
        except UnicodeDecodeError:
            lines.append(f"{token} {content!r} {len(content)}\n")
    file = folder / "rwkv_vocab_v20230424.txt"
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> WorldTokenizer:
    return load_world_tokenizer(published(tmp_path_factory.mktemp("world")), "hf:world")


def searched(text: str) -> list[int]:
    """Each time the longest of all tokens that the bytes begin with."""
    data, ids, tokens = text.encode(), [], vocabulary()
    while data:
        longest = max((content for content in tokens if data.startswith(content)), key=len)
        ids.append(tokens[longest])
        data = data[len(longest) :]
    return ids


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=3))).map("".join))
def test_it_takes_the_longest_token_each_time(tokenizer: WorldTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == searched(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.decode_stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == text


def test_a_text_that_ends_within_a_longer_token(tokenizer: WorldTokenizer) -> None:
    assert tokenizer.encode("aaaaaaa") == searched("aaaaaaa") != searched("aaaaaaaa")
    assert tokenizer.encode("") == []


def test_single_bytes_are_one_behind(tokenizer: WorldTokenizer) -> None:
    assert tokenizer.encode("\x00A~") == [1, 66, 127]
    assert tokenizer.vocab_size == max(vocabulary().values()) + 1


def test_the_end_of_a_text_is_zero_and_is_never_encoded(tokenizer: WorldTokenizer) -> None:
    assert tokenizer.separator == 0
    assert 0 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode_chat("a<|endoftext|>b") == [98, 0, 99]
    assert tokenizer.decode([98, 0, 99]) == "ab"
    with pytest.raises(DataError, match="299"):
        tokenizer.decode([299])


def test_special_tokens_are_those_of_the_configuration(tmp_path: Path) -> None:
    published(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"0": {"content": "<|end|>"}, "999": {"content": "<|end|>er"}}}'
    )
    found = intarsia.load_tokenizer(tmp_path)
    assert isinstance(found, WorldTokenizer)
    assert found.vocab_size == 1000
    assert found.encode_chat("<|end|>er<|end|>e") == [999, 0, 102]
    assert found.encode("<|end|>") == searched("<|end|>")


def test_saved_it_is_the_same(tokenizer: WorldTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("of the 中文\n\n'\\n\u2028") == tokenizer.encode("of the 中文\n\n'\\n\u2028")
    assert (again.name, again.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    without = {content: token for content, token in vocabulary().items() if content != b"then"}
    assert WorldTokenizer(without, {}, "x").fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("700 'abc' 4", "has 3 bytes, and the line says 4"),
        ("700 abc 3", "not an id, a token in quotes"),
        ("700 open('x') 3", "not an id, a token in quotes"),
        ("700 '' 0", "not an id, a token in quotes"),
        ("-7 'abc' 3", "not an id, a token in quotes"),
        ("700 'then' 4", "there twice"),
        ("0 'abc' 3", "0 ends a text"),
        ("300 'abc' 3", "two tokens of one id"),
    ],
)
def test_a_damaged_vocabulary_is_named(line: str, match: str, tmp_path: Path) -> None:
    file = published(tmp_path)
    with file.open("a", encoding="utf-8") as end:
        end.write(line + "\n")
    with pytest.raises(DataError, match=match):
        load_tokenizer(tmp_path)


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    tokens = vocabulary()
    del tokens[b"\x80"]
    published(tmp_path, tokens)
    with pytest.raises(DataError, match="no token for the byte 0x80"):
        load_tokenizer(tmp_path)
    (tmp_path / "rwkv_vocab_other.txt").write_text("")
    with pytest.raises(DataError, match="2 files"):
        load_tokenizer(tmp_path)
    for special in ({66: "B"}, {700: ""}):
        with pytest.raises(DataError, match="which it is not"):
            WorldTokenizer(vocabulary(), special, "x")
