"""Mixers from a file of the user's own, without a package around it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from intarsia.errors import ConfigError
from intarsia.mixers import config_from_dict, config_to_dict, mixer, names
from intarsia.mixers.plugins import VARIABLE
from intarsia.mixers.registry import use_plugins
from intarsia.model import ModelConfig
from intarsia.model.fingerprint import changes, fingerprint

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer" / "learned_decay.py"
OPTIONS = {"type": "learned-decay", "num_heads": 2, "head_dim": 8}


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with a mixer. What is plugged in is forgotten afterwards."""
    monkeypatch.setenv(VARIABLE, "")
    before = set(sys.modules)
    file = tmp_path / "my-layer.py"
    file.write_text(EXAMPLE.read_text())
    yield file
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def model() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "vocab_size": 64, "d_model": 16, "depth": 1, "layout": "mine",
            "feed_forward": {"d_hidden": 32}, "mixers": {"mine": OPTIONS},
        }
    )  # fmt: skip


def test_a_file_adds_a_mixer(layer: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no mixer 'learned-decay'[\s\S]*--plugin FILE\.py[\s\S]*'intarsia\.mixers'"
    ):
        mixer("learned-decay")
    use_plugins([layer])
    assert "learned-decay" in names()
    config = config_from_dict(OPTIONS)
    assert config_from_dict(config_to_dict(config)) == config
    assert type(config) is mixer("learned-decay")
    use_plugins([layer])
    assert names().count("learned-decay") == 1


def test_processes_that_are_started_know_it_too(layer: Path) -> None:
    use_plugins([layer])
    code = "from intarsia.mixers import mixer; print(mixer('learned-decay').__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "my_layer\n", done.stderr


def test_its_code_is_part_of_a_run(layer: Path) -> None:
    use_plugins([layer])
    before = fingerprint(model())
    assert before.files == {"my_layer": str(layer)}
    assert "my_layer" in before.code
    layer.write_text(EXAMPLE.read_text().replace("uniform_(2, 6", "uniform_(3, 6") + "# changed\n")
    assert changes(before.to_dict(), fingerprint(model()).to_dict()) == ["the code of my_layer changed"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no plugin"),
        ("x = 1", "defines no mixer"),
        ("from intarsia.mixers import KDAConfig", "defines no mixer"),
        ("1 / 0", "failed with ZeroDivisionError"),
        ("import no_such_module", "failed with ModuleNotFoundError"),
        ("def", "failed with SyntaxError"),
    ],
)
def test_files_that_add_none(layer: Path, content: str | None, message: str) -> None:
    layer.unlink()
    if content is not None:
        layer.write_text(content)
    with pytest.raises(ConfigError, match=message):
        use_plugins([layer])
    assert not os.environ[VARIABLE]
    assert "my_layer" not in sys.modules or content in ("x = 1", "from intarsia.mixers import KDAConfig")


def test_names_that_are_taken(layer: Path) -> None:
    text = EXAMPLE.read_text()
    other = layer.with_name("json.py")
    other.write_text(text)
    with pytest.raises(ConfigError, match="cannot be called 'json': another module is; rename the file"):
        use_plugins([other])
    kda = layer.with_name("plugged_kda.py")
    kda.write_text(text.replace('"learned-decay"', '"kda"'))
    with pytest.raises(ConfigError, match="calls a mixer 'kda', as this package does"):
        use_plugins([kda])
    assert not os.environ[VARIABLE]
    twin = layer.with_name("plugged_twin.py")
    twin.write_text(text)
    use_plugins([layer])
    with pytest.raises(ConfigError, match="calls a mixer 'learned-decay', as the plugin 'my_layer' does"):
        use_plugins([twin])
