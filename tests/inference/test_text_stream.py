"""Text as it comes, up to a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.errors import ConfigError
from intarsia.inference.text_stream import TextStream

TEXTS = st.text(alphabet="abä\n", max_size=30)


@given(text=TEXTS, stops=st.lists(st.text(alphabet="abä\n", min_size=1, max_size=4), max_size=3))
def test_gives_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, stops)
    given_out, pushed = "", b""
    for token in tokenizer.encode(text):
        given_out += stream.push(token)
        pushed += bytes([token])
        if stream.stopped:
            break
    given_out += stream.finish()
    # The first that is whole decides; of two that end with one token, the one that begins first.
    seen = pushed.decode() if stream.stopped else text
    ends = [at for stop in stops if (at := seen.find(stop)) >= 0]
    assert given_out == (seen[: min(ends)] if ends else text)
    assert stream.stopped == any(stop in text for stop in stops)


def test_what_cannot_be_a_stop_string_is_not_held_back() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(token) for token in tokenizer.encode("aEbEN")] == ["a", "", "Eb", "", ""]
    assert stream.finish() == "EN"
    with pytest.raises(ConfigError, match="empty"):
        TextStream(tokenizer, [""])
