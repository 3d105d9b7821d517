"""The table of mixers, and how other packages add to it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from intarsia.cli import main
from intarsia.errors import ConfigError
from intarsia.mixers import MixerConfig, config_from_dict, config_to_dict, mixer, mixers, names
from intarsia.mixers.registry import ENTRY_POINTS, own_mixers

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer"


def install(directory: Path, entries: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave in `directory` what installing a package with these entry points leaves, and look there too."""
    metadata = directory / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(directory)


@pytest.mark.parametrize("config", own_mixers(), ids=lambda config: config.type)
def test_the_table_tells_of_every_mixer(config: type[MixerConfig]) -> None:
    about = config.about
    assert about.title
    assert about.brought
    assert 2014 <= about.year <= 2026
    assert about.equation.isascii()
    assert len(about.equation) <= 80
    example = config.example()
    assert config_from_dict(config_to_dict(example)) == example
    assert mixer(config.type) is config


def test_the_oldest_come_first() -> None:
    years = [config.about.year for config in mixers()]
    assert years == sorted(years)
    assert len(set(names())) == len(names())


def test_a_name_that_is_nearly_one_is_guessed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kda'"):
        mixer("kdaa")


def test_an_installed_package_adds_a_mixer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(tmp_path, project["entry-points"][ENTRY_POINTS], monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLE)
    assert "learned-decay" in names()
    config = config_from_dict({"type": "learned-decay", "num_heads": 2, "head_dim": 8})
    assert config_from_dict(config_to_dict(config)) == config
    assert main(["mixers", "learned-decay"]) == 0
    assert "Retention with learnt decays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such_module:Config", "cannot be loaded from 'no_such_module:Config'"),
        ("intarsia.mixers:NoSuch", "cannot be loaded"),
        ("pathlib:Path", "must name a MixerConfig whose type is 'other'"),
        ("intarsia.mixers:KDAConfig", "must name a MixerConfig whose type is 'other'"),
    ],
)
def test_an_entry_point_that_gives_no_mixer_is_named(
    value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, {"other": value}, monkeypatch)
    with pytest.raises(ConfigError, match=problem):
        mixer("other")


def test_an_installed_package_cannot_take_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, {"kda": "pathlib:Path"}, monkeypatch)
    assert mixer("kda").__name__ == "KDAConfig"
    assert names().count("kda") == 1
