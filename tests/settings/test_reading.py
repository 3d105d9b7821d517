"""Settings: what every mixer takes and what it refuses, by constructor and from a file, and how errors are told."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from intarsia.errors import ConfigError, OptionError
from intarsia.layers.rope import Yarn
from intarsia.mixers import AttentionConfig, MixerConfig, config_from_dict, config_to_dict
from intarsia.mixers.registry import own_mixers
from intarsia.settings import check_bounds, convert, read, settle_types

OPTIONS = [(config, field.name) for config in own_mixers() for field in dataclasses.fields(config)]


def wrong_values(hint: Any) -> list[Any]:
    """Values that no option of this type may have: of other types, and their likes."""
    literals = {value for part in (hint, *typing.get_args(hint)) for value in typing.get_args(part)}
    parts = {hint, *typing.get_args(hint)}
    values: list[Any] = ["no", [2], {"a": 1}, object()]
    if bool not in parts:
        values += [True, False]
    if float not in parts:
        values += [2.5, float("nan")]
        if int not in parts:
            values += [2]
    else:
        values += [float("nan"), float("inf")]
    if type(None) not in parts:
        values += [None]
    return [value for value in values if not isinstance(value, str) or value not in literals]


@pytest.mark.parametrize(("config", "name"), OPTIONS, ids=lambda part: getattr(part, "type", part))
def test_every_option_of_every_mixer_has_a_type(config: type[MixerConfig], name: str) -> None:
    example = config.example()
    for value in wrong_values(typing.get_type_hints(config)[name]):
        with pytest.raises(ConfigError, match=name) as caught:
            dataclasses.replace(example, **{name: value})
        assert isinstance(caught.value, OptionError), value
        with pytest.raises(OptionError) as caught:
            config_from_dict({**config_to_dict(example), name: value})
        assert caught.value.path[0] == name
        assert str(caught.value).startswith(name)


@dataclass(frozen=True)
class Limited:
    """A table that is wrong as a whole, or missing."""

    size: int

    def __post_init__(self) -> None:
        if self.size == 3:
            raise OptionError("three of it is too many")


@dataclass(frozen=True)
class MayLimit:
    part: Limited | None = None


def test_a_table_that_may_be_missing_says_what_is_wrong_with_it() -> None:
    assert read(MayLimit, {}) == read(MayLimit, {"part": None}) == MayLimit()
    with pytest.raises(OptionError, match=r"^part: three of it is too many"):
        read(MayLimit, {"part": {"size": 3}})
    with pytest.raises(OptionError, match=r"^part\.size must be a whole number"):
        read(MayLimit, {"part": {"size": "3"}})
    with pytest.raises(OptionError, match=r"^part must be a table or none"):
        read(MayLimit, {"part": 3})


def test_tables_within() -> None:
    yarn = {"factor": 4, "original_length": 100}
    assert AttentionConfig(2, 16, yarn=yarn).yarn == Yarn(4.0, 100)
    with pytest.raises(
        OptionError, match=r"^yarn\.original_length must be a whole number; got 2\.5"
    ) as caught:
        AttentionConfig(2, 16, yarn={**yarn, "original_length": 2.5})
    assert caught.value.path == ("yarn", "original_length")
    with pytest.raises(OptionError, match=r"^yarn\.original_length is missing"):
        AttentionConfig(2, 16, yarn={"factor": 4})


def test_a_mixer_of_another_package_need_not_check_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Careless(MixerConfig):
        type = "careless"
        size: int
        table: typing.Any = None
        sizes: list[int] = dataclasses.field(default_factory=list)

        def __post_init__(self) -> None:
            self.size + 1

    monkeypatch.setattr("intarsia.mixers.registry.plugin_mixers", lambda: (Careless,))
    assert config_from_dict({"type": "careless", "size": 2, "table": object}).size == 2
    with pytest.raises(OptionError, match=r"^size must be a whole number; got 'two'"):
        config_from_dict({"type": "careless", "size": "two"})
    with pytest.raises(OptionError, match=r"^sizes\[1\] must be a whole number"):
        config_from_dict({"type": "careless", "size": 2, "sizes": [1, "x"]})


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("softpuls", Literal["softplus", "bounded", "none"], "'softplus' or 'bounded' or 'none'; got 'softpuls'; did"),
        (2.5, int | Literal["head"] | None, "a whole number or 'head' or none; got 2.5 (float)"),
        (1, Literal[True], "True; got 1"),
        ((1.0,), tuple[float, float], "a list of 2"),
        (3, tuple[float, ...], "a list"),
        (3, dict[str, int], "a table"),
    ],
)  # fmt: skip
def test_messages(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        convert(value, hint, ("option",))
    assert f"option must be {message}" in str(caught.value)


def test_what_is_right_is_left_alone() -> None:
    for config in own_mixers():
        example = config.example()
        settle_types(example)
        assert example == config.example()
    assert convert([0.9, 1], tuple[float, float]) == (0.9, 1.0)
    anything = object()
    assert convert(anything, Any) is anything


@dataclass(frozen=True)
class Part:
    """A dataclass that checks itself."""

    size: int
    share: float | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "size", least=1)
        check_bounds(self, "share", above=0, most=1)
        if self.size == 13:
            raise ConfigError("thirteen brings bad luck")


@dataclass(frozen=True)
class Whole:
    """One with others within it."""

    parts: tuple[Part, ...]
    named: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    rule: Part | Literal["none"] = "none"
    rates: Sequence[int] | float = 1.0

    def __post_init__(self) -> None:
        settle_types(self)


def test_nested() -> None:
    values = {
        "parts": [{"size": 1}, {"size": 2, "share": 1}],
        "named": {"a": {"size": 3}},
        "rule": {"size": 4},
    }
    whole = read(Whole, values)
    assert whole == Whole((Part(1), Part(2, 1.0)), {"a": Part(3)}, Part(4))
    assert isinstance(whole.parts[1].share, float)
    assert Whole(**values) == whole, "a constructor takes the same"  # type: ignore[arg-type]
    assert read(Whole, whole) is whole
    assert read(Whole, {"parts": [], "rates": 3}).rates == 3.0
    assert read(Whole, {"parts": [], "rates": [3]}).rates == [3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (3, "must be a table; got 3 (int)"),
        ({}, "parts is missing"),
        ({"parts": [], "nmaed": 1}, "nmaed: unknown option; did you mean 'named'?"),
        ({"parts": {}}, "parts must be a list; got {} (dict)"),
        ({"parts": [{"size": 1}, {"size": "x"}]}, "parts[1].size must be a whole number; got 'x'"),
        ({"parts": [{"size": 0}]}, "parts[0].size must be at least 1; got 0"),
        ({"parts": [{"size": 1, "share": 2}]}, "parts[0].share must be above 0 and at most 1; got 2.0"),
        ({"parts": [{"size": 13}]}, "parts[0]: thirteen brings bad luck"),
        ({"parts": [], "named": {"a": {"share": 1}}}, "named.a.size is missing"),
        ({"parts": [], "rule": {"size": 2.5}}, "rule.size must be a whole number; got 2.5 (float)"),
        ({"parts": [], "rule": "nine"}, "rule must be a table or 'none'; got 'nine'"),
        ({"parts": [], "rates": [1.5]}, "rates[0] must be a whole number; got 1.5 (float)"),
        ({"parts": [], "rates": "x"}, "rates must be a list or a finite number; got 'x'"),
    ],
)
def test_errors_say_where_and_what(values: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(Whole, values)
    assert str(caught.value) == message
    assert str(caught.value.under(("a", 0)).at("plan.toml:7")).startswith("plan.toml:7: a[0]")
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_a_reader_of_ones_own() -> None:
    def by_name(value: Any) -> Part:
        if value != "small":
            raise OptionError("must be 'small'")
        return Part(1)

    assert read(Whole, {"parts": ["small"]}, {Part: by_name}).parts == (Part(1),)
    with pytest.raises(OptionError, match=r"^parts\[1\] must be 'small'"):
        read(Whole, {"parts": ["small", "large"]}, {Part: by_name})
