"""What a run is: everything that decides its numbers is in its name, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from intarsia.ladder.measuring import MeasuredArm, MeasureSpec
from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import UNDECISIVE, RunSpec, TaskLesson, TextLesson

FINGERPRINT: dict[str, dict[str, str]] = {
    "versions": {"torch": "2.13.0"},
    "arithmetic": {"kernels": "avx2 00"},
    "code": {"intarsia.mixers.kda": "00"},
    "commits": {"intarsia": "1234"},
}
TEXT = TextLesson(
    dataset="data/here",
    data_fingerprint="00",
    documents=(1, 2, 3),
    tokens_per_document=None,
    bytes_per_token=3.5,
)
TASK = TaskLesson(
    name="mqar-32", task="mqar", options={"length": 32, "pairs": 4}, examples=64, examine_every=10
)
SPEC = RunSpec(
    arm="hybrid",
    learning_rate=1e-3,
    seed=1,
    role="judged",
    model={"depth": 2},
    train={"steps": 10, "rows": 2, "length": 64},
    lesson=TEXT,
    fingerprint=FINGERPRINT,
    threads=1,
)
OTHER: dict[str, Any] = {
    "arm": "other",
    "learning_rate": 2e-3,
    "seed": 2,
    "role": "tuning",
    "model": {"depth": 3},
    "train": {"steps": 11, "rows": 2, "length": 64},
    "lesson": TASK,
    "fingerprint": {**FINGERPRINT, "code": {}},
    "threads": 2,
    "processes": 2,
    "device": "cpu",
    "branches_from": "runs/other/train@8",
}
OTHER_LESSONS: dict[type, dict[str, Any]] = {
    TextLesson: {
        "dataset": "data/there",
        "data_fingerprint": "01",
        "documents": (1, 2, 4),
        "tokens_per_document": 100,
        "bytes_per_token": 3.6,
    },
    TaskLesson: {
        "name": "mqar",
        "task": "stack",
        "options": {"length": 32},
        "examples": 65,
        "examine_every": 11,
        "turns": ({"pairs": 2},),
        "mixture": ({"pairs": 2},),
    },
}
ARM = MeasuredArm("hybrid", {"depth": 2}, {"rows": 2}, "runs/hybrid", {"code": {"a": "00"}})
MEASURED = MeasureSpec(
    arms=(ARM,),
    dataset="data/here",
    data_fingerprint="00",
    contexts=(16,),
    decode_tokens=2,
    repeats=3,
    throughput_steps=4,
    prompts=("ab",),
    sample_tokens=5,
    temperature=0.5,
    top_p=0.9,
    threads=1,
    machine="a processor",
)
OTHER_MEASURED: dict[str, Any] = {
    "dataset": "data/there",
    "data_fingerprint": "01",
    "contexts": (16, 32),
    "decode_tokens": 3,
    "repeats": 4,
    "throughput_steps": 5,
    "prompts": (),
    "sample_tokens": 6,
    "temperature": 0.6,
    "top_p": 0.8,
    "threads": 2,
    "machine": "another",
}


def other_arm(field: str) -> MeasuredArm:
    values = {
        "name": "other",
        "model": {"depth": 3},
        "train": {"rows": 3},
        "run": None,
        "fingerprint": {"code": {"a": "01"}},
    }
    return dataclasses.replace(ARM, **{field: values[field]})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunSpec)])
def test_every_field_that_decides_numbers_changes_the_key(field: str) -> None:
    """A field that is added must say here what another value of it is."""
    assert set(UNDECISIVE) == {"dataset", "device", "branches_from"}
    other = dataclasses.replace(SPEC, **{field: OTHER[field]})
    assert (other.key == SPEC.key) is (field in UNDECISIVE)
    assert (other.directory_name == SPEC.directory_name) is (field in UNDECISIVE)


@pytest.mark.parametrize(
    ("lesson", "field"),
    [(lesson, field.name) for lesson in (TEXT, TASK) for field in dataclasses.fields(lesson)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_every_field_of_what_is_learned_changes_the_key(lesson: TextLesson | TaskLesson, field: str) -> None:
    spec = dataclasses.replace(SPEC, lesson=lesson)
    changed = dataclasses.replace(lesson, **{field: OTHER_LESSONS[type(lesson)][field]})
    other = dataclasses.replace(spec, lesson=changed)
    assert (other.key == spec.key) is (field in UNDECISIVE)
    assert (other.directory_name == spec.directory_name) is (field in UNDECISIVE)


@pytest.mark.parametrize("part", FINGERPRINT)
def test_of_the_fingerprint_all_counts_but_the_commits(part: str) -> None:
    other = dataclasses.replace(SPEC, fingerprint={**FINGERPRINT, part: {"another": "thing"}})
    assert (other.key == SPEC.key) is (part == "commits")


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(MeasureSpec) if field.name != "arms"]
)
def test_every_field_that_is_asked_for_is_measured_anew(field: str) -> None:
    other = dataclasses.replace(MEASURED, **{field: OTHER_MEASURED[field]})
    assert (other.key == MEASURED.key) is (field == "dataset"), "its content has a fingerprint"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MeasuredArm)])
def test_every_arm_that_is_another_is_measured_anew(field: str) -> None:
    assert dataclasses.replace(MEASURED, arms=(other_arm(field),)).key != MEASURED.key


def test_a_spec_comes_back_from_the_disk(tmp_path: Any) -> None:
    for name, lesson in (("a", TEXT), ("b", TASK)):
        spec = dataclasses.replace(SPEC, lesson=lesson)
        RunFolder(tmp_path / name).claim(spec)
        assert RunSpec.load(tmp_path / name) == spec


def test_what_changed_is_told_of_the_same_run_alone(tmp_path: Any) -> None:
    RunFolder(tmp_path / SPEC.directory_name).claim(SPEC)
    newer = dataclasses.replace(SPEC, fingerprint={**FINGERPRINT, "versions": {"torch": "2.14.0"}})
    assert newer.changed_since(tmp_path) == ["torch was 2.13.0, is 2.14.0"]
    assert SPEC.changed_since(tmp_path) == []
    another = dataclasses.replace(newer, lesson=dataclasses.replace(TEXT, documents=(7, 8)))
    assert another.changed_since(tmp_path) == [], "another plan is no other code"
    assert newer.changed_since(tmp_path / "nowhere") == []
