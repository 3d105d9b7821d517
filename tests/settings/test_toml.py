"""TOML: what is written says what it was given, and lines are found."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from intarsia.settings import toml
from intarsia.settings.toml import line_of


def test_lines_of_nested_tables() -> None:
    text = '[a]\nx = 1\n[[b]]\ny = """\n[c]\n"""\n[b.c]\nz = 1\n[[b]]\ny = 2\n'
    assert line_of(text, ("a", "x")) == 2
    assert line_of(text, ("b", 0, "c", "z")) == 8
    assert line_of(text, ("b", 1, "y")) == 10
    assert line_of(text, ("b", 1, "missing")) == 9
    assert line_of(text, ("nowhere",)) is None


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
tables = st.recursive(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), scalars, max_size=3),
    lambda inner: st.dictionaries(
        st.text("abc d", min_size=1, max_size=4),
        scalars
        | inner.filter(bool)
        | st.lists(scalars, max_size=3)
        | st.lists(inner, min_size=1, max_size=3),
        max_size=4,
    ),
    max_leaves=8,
)


@given(tables)
def test_toml_says_what_it_was_given(values: dict) -> None:
    def without_empty_tables(value):
        if isinstance(value, dict):
            return {key: without_empty_tables(item) for key, item in value.items() if item != {}}
        return [without_empty_tables(item) for item in value] if isinstance(value, list) else value

    text = toml.dumps(values)
    assert without_empty_tables(tomllib.loads(text)) == without_empty_tables(values)
