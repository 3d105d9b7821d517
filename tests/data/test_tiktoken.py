"""Kimi's tokenizer: beside pieces cut by another library's expressions, and pairs joined one by one."""

from __future__ import annotations

import collections
import functools
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import intarsia
from intarsia.data import load_tokenizer
from intarsia.data.tiktoken_tokenizer import LONGEST_CALL, LONGEST_RUN, TiktokenTokenizer, cut, pattern
from intarsia.errors import DataError

pytest.importorskip("tiktoken")
regex = pytest.importorskip("regex")

SAMPLE = (
    "the theme of them was the thing; getHTTPResponse returns self.value and don't you're we'll I'VE 12345 1234 "
    "def f(x):\n    return x\n\n\n  北京市的中文和汉字，中文混合 中文 的的的的的 "
    "été naïve привет мир  aaaaaaaa aaaa ==== --- 😀😀 👩‍👩‍👧\n"
) * 3
SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 5: "<|im_user|>", 9: "<|im_assistant|>"}
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aAbB'sS ré中文汉的 012\n\r\té😀\u0301ǅʰ々〇"),
    )
)


def pieces(text: str) -> list[str]:
    """What the expression cuts, by a library that has sets of its own."""
    found: list[str] = [m.group() for m in regex.finditer(pattern(), text, regex.V1)]
    assert "".join(found) == text
    return found


def joined(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The pair whose union has the lowest rank is joined, the first of equals, until none is left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@functools.cache
def ranks() -> dict[bytes, int]:
    """A vocabulary of 600, made as such are: the commonest pair becomes a token."""
    made = {bytes([byte]): byte for byte in range(256)}
    words = [[*(bytes([b]) for b in piece.encode())] for piece in pieces(SAMPLE)]
    while len(made) < 600:
        pairs = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        (a, b), _ = pairs.most_common(1)[0]
        made.setdefault(a + b, len(made))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
    return made


def expected(text: str) -> list[int]:
    return [
        ranks()[token] for part in cut(text) for p in pieces(part) for token in joined(p.encode(), ranks())
    ]


@pytest.fixture(scope="module")
def kimi() -> TiktokenTokenizer:
    count = len(ranks())
    return TiktokenTokenizer(ranks(), {count + n: text for n, text in SPECIAL.items()}, "[EOS]", "kimi")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
        ("漢字とかな", ["漢字", "とかな"]),
        ("getHTTPResponse", ["get", "HTTPResponse"]),
        ("camelCase snake_case", ["camel", "Case", " snake", "_case"]),
        ("don't WE'LL you'Re", ["don't", " WE'LL", " you'Re"]),
        ("x = 1234567;", ["x", " =", " ", "123", "456", "7", ";"]),
        ("f(x):\n    return", ["f", "(x", "):\n", "   ", " return"]),
        ("a  \n\n  b", ["a", "  \n\n", " ", " b"]),
        ("😀😀 é\u0301!", ["😀😀", " é\u0301", "!"]),
    ],
)
def test_pieces(kimi: TiktokenTokenizer, text: str, parts: list[str]) -> None:
    assert pieces(text) == parts
    assert kimi.encode(text) == [token for part in parts for token in kimi.encode(part)] == expected(text)


@given(TEXTS)
def test_any_text(kimi: TiktokenTokenizer, text: str) -> None:
    ids = kimi.encode(text)
    assert ids == expected(text)
    assert kimi.decode(ids) == text
    stream = kimi.decode_stream()
    assert "".join([stream.push(token) for token in ids] + [stream.finish()]) == text


def test_long_runs_are_cut(kimi: TiktokenTokenizer) -> None:
    """As Kimi's own tokenizer does, whose tokens would be others without."""
    for character in ("a", " ", "中", "😀", "=", "\n"):
        text = "b c" + character * (2 * LONGEST_RUN + 7)
        ids = kimi.encode(text)
        assert kimi.decode(ids) == text
        parts = list(cut(text))
        assert ids == [token for part in parts for token in kimi.encode(part)]
        run = 2 * LONGEST_RUN + 7 + (not character.isspace())  # the "c" is of the same kind
        assert [len(part) for part in parts] == [
            3 - (run - 2 * LONGEST_RUN - 7) + LONGEST_RUN,
            LONGEST_RUN,
            run - 2 * LONGEST_RUN,
        ]
    assert [len(part) for part in cut("a " * LONGEST_CALL)] == [LONGEST_CALL, LONGEST_CALL]
    assert list(cut("")) == []


def test_special_tokens(kimi: TiktokenTokenizer) -> None:
    count = len(ranks())
    assert (kimi.vocab_size, kimi.separator) == (count + 256, count + 1)
    assert kimi.decode([count + 2, count + 3]) == f"<|im_end|><|reserved_token_{count + 3}|>"
    text = "<|im_user|>hi<|im_end|>[EOS]"
    assert max(kimi.encode(text)) < count  # a text that spells them is a text
    assert kimi.encode_chat(text) == [count + 5, *kimi.encode("hi"), count + 2, count + 1]


def test_a_folder(tmp_path: Path, kimi: TiktokenTokenizer) -> None:
    """`intarsia.load_tokenizer` knows it by its file, with or without ours beside it."""
    kimi.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.fingerprint(), loaded.name) == (kimi.fingerprint(), "kimi")
    (tmp_path / "saved" / "intarsia.json").unlink()
    foreign = intarsia.load_tokenizer(tmp_path / "saved")
    assert foreign.fingerprint() == kimi.fingerprint()
    assert foreign.encode_chat(SAMPLE + "<|im_end|>") == kimi.encode_chat(SAMPLE + "<|im_end|>")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "QWenTokenizer"}',
            "how a QWenTokenizer cuts a text is not known",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<end>"}',
            "no token '<end>', which it names as its eos_token",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"3": {"content": "x"}}}',
            "names 3 as a special token",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "must name tokens by their ids"),
        ("tokenizer_config.json", "[]", "does not hold a JSON object"),
        ("tiktoken.model", "YQ== 0\n", "no token for the byte 0x00"),
        ("tiktoken.model", "YQ== 5\n", "ranks are not 0 to 0"),
        ("tiktoken.model", "YQ== 0\n? 1\n", "line 2: not a token in base64"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, kimi: TiktokenTokenizer, file: str, content: str, message: str
) -> None:
    kimi.save(tmp_path)
    (tmp_path / "intarsia.json").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_two_of_one_spelling() -> None:
    count = len(ranks())
    with pytest.raises(DataError, match="two special tokens of one spelling"):
        TiktokenTokenizer(ranks(), {count: "[EOS]", count + 1: "[EOS]"}, "[EOS]", "kimi")
