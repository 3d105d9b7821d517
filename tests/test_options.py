"""The types of options: what every mixer takes and what it refuses, by constructor and from a file."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from intarsia.errors import ConfigError, OptionError
from intarsia.layers.rope import Yarn
from intarsia.mixers import MixerConfig, config_from_dict, config_to_dict
from intarsia.mixers.registry import MIXERS
from intarsia.options import check_type, check_types

OPTIONS = [(config, field.name) for config in MIXERS for field in dataclasses.fields(config)]


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
        assert f"the mixer {config.type!r}: " in str(caught.value)


def test_yarn_too() -> None:
    assert Yarn.of({"factor": 4, "original_length": 100}) == Yarn(4.0, 100)
    with pytest.raises(
        OptionError, match=r"yarn\.original_length must be a whole number; got 2\.5"
    ) as caught:
        Yarn.of({"factor": 4, "original_length": 2.5})
    assert caught.value.path == ("yarn", "original_length")


def test_a_mixer_of_another_package_need_not_check_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Careless(MixerConfig):
        type = "careless"
        size: int
        table: typing.Any = None
        sizes: list[int] = dataclasses.field(default_factory=list)

        def __post_init__(self) -> None:
            self.size + 1

    monkeypatch.setattr("intarsia.mixers.registry.MIXERS", (*MIXERS, Careless))
    assert config_from_dict({"type": "careless", "size": 2, "table": object}).size == 2
    with pytest.raises(OptionError, match="size must be a whole number; got 'two'"):
        config_from_dict({"type": "careless", "size": "two"})
    with pytest.raises(OptionError, match="sizes must be a list"):
        config_from_dict({"type": "careless", "size": 2, "sizes": [1, "x"]})


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("softpuls", Literal["softplus", "bounded", "none"], "'softplus' or 'bounded' or 'none'; got 'softpuls'; did"),
        (2.5, int | Literal["head"] | None, "a whole number or 'head' or none; got 2.5 (float)"),
        (1, Literal[True], "True; got 1"),
        ((1.0,), tuple[float, float], "a list of 2"),
        ((1.0, "x"), tuple[float, ...], "a list"),
    ],
)  # fmt: skip
def test_messages(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_type("option", value, hint)
    assert f"option must be {message}" in str(caught.value)


def test_what_is_right_is_left_alone() -> None:
    for config in MIXERS:
        check_types(config.example())
    check_type("betas", [0.9, 1], tuple[float, float])
    check_type("any", object(), Any)
