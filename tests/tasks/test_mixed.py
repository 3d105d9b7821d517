"""Several difficulties of one task in turn."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import ConfigError, OptionError
from intarsia.tasks import make_task
from intarsia.tasks.mixed import Mixed, combinations
from intarsia.tasks.registry import make_mixed
from support.task_solvers import solve_zoology

OPTIONS = {"length": 32, "vocabulary": 32}
PAIRS = (2, 4, 8)


def mixed() -> Mixed:
    made = make_mixed("zoology-mqar", OPTIONS, combinations({"pairs": PAIRS}))
    assert isinstance(made, Mixed)
    return made


def test_parts_take_turns_and_draw_for_themselves() -> None:
    inputs, targets = mixed().examples(seed=3, indices=12, split="test")
    for row in range(12):
        one = make_task("zoology-mqar", {**OPTIONS, "pairs": PAIRS[row % 3]})
        alone = one.examples(seed=3, indices=range(row, row + 1), split="test")
        assert torch.equal(inputs[row], alone.inputs[0])
        assert torch.equal(targets[row], alone.targets[0])
        assert int((targets[row] >= 0).sum()) == PAIRS[row % 3]
        answers = solve_zoology(mixed().show(inputs[row]).split())
        assert {place: int(name) for place, name in answers.items()} == {
            place: int(targets[row, place]) for place in range(32) if targets[row, place] >= 0
        }


def test_an_example_is_the_same_in_any_batch() -> None:
    whole = mixed().examples(seed=1, indices=9)
    part = mixed().examples(seed=1, indices=range(4, 7))
    assert torch.equal(whole.inputs[4:7], part.inputs)
    assert torch.equal(whole.targets[4:7], part.targets)


def test_combinations() -> None:
    assert combinations({}) == []
    assert combinations({"a": (1, 2), "b": (3, 4)}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert make_mixed("zoology-mqar", OPTIONS, []) == make_task("zoology-mqar", OPTIONS)


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="have the length, 32; one has 64: batches have one length"):
        make_mixed("zoology-mqar", OPTIONS, [{"length": 32}, {"length": 64}])
    with pytest.raises(ConfigError, match="the same tokens; one has 40 and another 32"):
        make_mixed("zoology-mqar", OPTIONS, [{}, {"vocabulary": 40}])
    with pytest.raises(OptionError, match="take 48 tokens; the length is 32"):
        make_mixed("zoology-mqar", OPTIONS, [{"pairs": 12}])
    with pytest.raises(ConfigError, match="at least one task"):
        Mixed(32)
