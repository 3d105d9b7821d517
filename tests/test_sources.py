"""Which files a piece of code is made of, and when two versions of it are the same code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from intarsia.errors import ConfigError
from intarsia.sources import UNREADABLE, find_source, sources_of

FILES = {
    "strange_package/__init__.py": "from strange_package.layer import Layer\nfrom .unused import unused\n",
    "strange_package/layer.py": (
        "from __future__ import annotations\n"
        "import json, numpy\n"
        "from typing import TYPE_CHECKING\n"
        "from . import sizes\n"
        "from strange_helper import twice\n"
        "if TYPE_CHECKING:\n"
        "    from strange_package.unused import unused\n"
        "class Base: ...\n"
        "class Layer(Base):\n"
        "    def late(self):\n"
        "        from .late import late\n"
        "        return late\n"
    ),
    "strange_package/sizes.py": "SIZE = 3\n",
    "strange_package/late.py": "def late(): ...\n",
    "strange_package/unused.py": "def unused(): ...\n",
    "strange_helper.py": "def twice(x):\n    return 2 * x\n",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package and a module in a directory where somebody works on them."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_a_module_is_read_with_what_it_imports(place: Path) -> None:
    found = sources_of(["strange_package.layer"])
    assert set(found.hashes) == {
        "strange_package.layer",
        "strange_package.sizes",
        "strange_package.late",
        "strange_helper",
    }
    assert found.libraries == {"numpy"}
    assert "strange_package" not in sys.modules, "nothing was imported"


def test_a_name_that_a_package_passes_on_is_looked_up_where_it_is_defined(place: Path) -> None:
    (place / "user.py").write_text("from strange_package import Layer\n")
    assert set(sources_of(["user"]).hashes) - {"user"} == set(sources_of(["strange_package.layer"]).hashes)
    (place / "other_user.py").write_text("import strange_package\n")
    assert "strange_package.unused" in sources_of(["other_user"]).hashes, "imported whole, it is read whole"


def test_a_library_is_named_and_not_read_unless_it_is_asked_for(place: Path) -> None:
    assert not any(name.startswith("numpy") for name in sources_of(["strange_package.layer"]).hashes)
    assert "rich.errors" in sources_of(["rich.errors"]).hashes


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Says more."""\n# A comment.\ndef twice( x ):\n    """And more."""\n\n    return (2*x)\n', True),
        ("def twice(x):\n    return 3 * x\n", False),
        ("def twice(x):\n    return 2 * x\nEXTRA = 1\n", False),
        ('def twice(x):\n    return "2 * x"\n', False),
    ],
)
def test_only_code_counts(place: Path, text: str, same: bool) -> None:
    before = sources_of(["strange_package.layer"]).hashes
    (place / "strange_helper.py").write_text(text)
    after = sources_of(["strange_package.layer"]).hashes
    assert (before["strange_helper"] == after.pop("strange_helper")) is same
    assert after == {name: value for name, value in before.items() if name != "strange_helper"}


def test_an_expression_of_hundreds_of_terms_is_read(place: Path) -> None:
    before = sources_of(["strange_package.layer"]).hashes
    for last in (1, 2):
        terms = " + ".join(["1"] * 800 + [str(last)])
        (place / "strange_helper.py").write_text(f"import strange_package.unused\nMANY = {terms}\n")
        after = sources_of(["strange_package.layer"]).hashes
        assert "strange_package.unused" in after
        assert after["strange_helper"] != before["strange_helper"]
        before = after


def test_classes_stand_for_the_files_of_all_that_they_inherit_from(place: Path) -> None:
    (place / "heir.py").write_text("from strange_package.layer import Base\nclass Heir(Base): ...\n")
    heir = importlib.import_module("heir").Heir
    assert {"heir", "strange_package.layer"} <= set(sources_of(classes=[heir]).hashes)
    assert not any(name.startswith("builtins") for name in sources_of(classes=[heir]).hashes)


def test_a_file_that_is_on_no_path_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "hidden").mkdir()
    (place / "hidden" / "apart.py").write_text("class Apart: ...\n")
    spec = importlib.util.spec_from_file_location("apart", place / "hidden" / "apart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "apart", module)
    spec.loader.exec_module(module)
    assert find_source("apart") == place / "hidden" / "apart.py"
    assert set(sources_of(classes=[module.Apart]).hashes) == {"apart"}


def test_a_class_without_a_file_is_not_passed_over_silently() -> None:
    names: dict[str, type] = {}
    exec("class Typed: ...", {"__name__": "typed_in"}, names)
    with pytest.warns(UserWarning, match="the source of Typed cannot be read"):
        assert sources_of(classes=[names["Typed"]]).hashes == {"typed_in.Typed": UNREADABLE}


def test_what_cannot_be_found_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'intarsia\.training\.lop' cannot be found"):
        sources_of(["intarsia.training.lop"])
