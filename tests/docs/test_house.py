"""The figure of docs/house.md is what is really passed, and up to date."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import intarsia
from intarsia.inference import generate
from intarsia.model import LanguageModel, presets
from intarsia.ops import native

ROOT = Path(__file__).parents[2]
PACKAGE = Path(intarsia.__file__).parent
FIGURE = ROOT / "docs" / "figures" / "house.py"
needs_kernels = pytest.mark.skipif(native.missing_reason() is not None, reason="the figure shows the kernels")


@pytest.fixture(scope="module")
def house() -> dict[str, Any]:
    return runpy.run_path(str(FIGURE))


def stops(house: dict[str, Any], way: str) -> list[str]:
    return [stop.file for floor in house["FLOORS"] for stop in getattr(floor, way)]


def passed(run: Callable[[], Any], last: str) -> list[str]:
    """The package's files on the way to the last call in the file `last`, the outermost first."""
    found: list[str] = []

    def look(frame: FrameType | None, event: str, _: Any) -> None:
        name = None if frame is None else file_of(frame)
        if event != "call" or name != last:
            return
        found.clear()
        while frame is not None:
            if (name := file_of(frame)) is not None and name not in found:
                found.insert(0, name)
            frame = frame.f_back

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def file_of(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def model() -> LanguageModel:
    made = LanguageModel(presets.get("kimi-linear-nano", vocab_size=32))
    made.init_weights(0)
    return made


def test_the_floors_are_the_packages(house: dict[str, Any]) -> None:
    layers = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["LAYERS"]
    # Below all floors stand the rooms of the ground.
    assert [floor.name for floor in house["FLOORS"]] == [*layers[: layers.index("ops") + 1], "csrc"]


def test_what_is_passed_is_there(house: dict[str, Any]) -> None:
    for way in ("training", "decoding"):
        for file in stops(house, way):
            assert (ROOT / file if file.startswith("csrc/") else PACKAGE / file).exists(), file


@needs_kernels
def test_the_way_of_a_batch(house: dict[str, Any]) -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    expected = [
        file for file in stops(house, "training") if file.startswith(("model", "mixers", "layers", "ops"))
    ]
    way = passed(lambda: model()(tokens, tokens), expected[-1])
    assert [file for file in way if file in expected] == expected


@needs_kernels
def test_the_way_of_a_token(house: dict[str, Any]) -> None:
    expected = [file for file in stops(house, "decoding") if not file.startswith(("cli", "csrc"))]
    way = passed(lambda: list(generate(model(), [1, 2], max_tokens=2)), expected[-1])
    assert [file for file in way if file in expected] == expected


def test_the_figure_is_up_to_date(house: dict[str, Any]) -> None:
    written = FIGURE.with_suffix(".svg").read_text(encoding="utf-8")
    assert written == house["figure"]() + "\n", "run: python docs/figures/house.py"
