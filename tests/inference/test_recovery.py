"""What goes wrong in the engine's own books: texts are read again from what they say, and who is to blame ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from intarsia.inference import EngineSettings, LookUp
from intarsia.inference.engine import Engine
from intarsia.inference.prefix_tree import PrefixTree
from intarsia.inference.requests import Event, Request
from intarsia.inference.room import Room
from intarsia.inference.scheduler import Scheduler
from intarsia.inference.speculation import Speculation
from intarsia.model import InferenceModel
from support.engine_cases import WARM, answers, ended, expected, model_of, requests_of
from support.small_models import tokens_of

PLACES = [
    (Room, "find"), (Room, "begin"), (Room, "fork"), (Room, "view"), (Room, "keep"), (Room, "keep_last"),
    (PrefixTree, "put"), (Scheduler, "pieces"), (Scheduler, "start"), (Scheduler, "is_place"),
    (Speculation, "guess"), (Speculation, "settle"), (Engine, "_others"), (Engine, "_note"),
]  # fmt: skip
AT = (4, 60, 230)
"""The calls that go wrong."""
SETTINGS = EngineSettings(sequences=3, snapshots=6, tokens=600, step_tokens=40, piece=16, snapshot_every=16)


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return model_of("kda*3 mla")


def failing(inner: Callable[..., Any], when: Callable[[], bool], after: bool) -> Callable[..., Any]:
    """The same function, which goes wrong before or after its work when it is told so."""

    def called(*args: Any, **options: Any) -> Any:
        wrong = when()
        if wrong and not after:
            raise RuntimeError("the books are wrong")
        found = inner(*args, **options)
        if wrong:
            raise RuntimeError("the books are wrong")
        return found

    return called


def until_done(engine: Engine, steps: int = 2000) -> Iterator[Event]:
    for _ in range(steps):
        if not engine.has_work:
            return
        yield from engine.step()
        engine.check_integrity()
    raise AssertionError(f"not done after {steps} steps")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_an_error_that_does_not_come_again_is_not_noticed(
    owner: type, name: str, after: bool, model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), lambda: next(calls) in AT, after))
    requests = requests_of(5)
    engine = Engine(model, SETTINGS, LookUp(longest=2, shortest=1))
    for request in requests:
        engine.submit(request)
    events = list(until_done(engine))
    assert answers(events) == expected(model, requests)
    assert all(each.error is None for each in ended(events))
    assert engine.report().begun_anew > 0


@pytest.mark.parametrize(("owner", "name"), [(Room, "find"), (PrefixTree, "put")])
def test_who_is_to_blame_ends_and_the_others_do_not_notice(
    owner: type, name: str, model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tuple(tokens_of(21, seed=9))
    requests = [*requests_of(6, 5), Request(bad, max_tokens=9), *requests_of(7, 5)]
    inner = getattr(owner, name)

    def called(self: Any, text: Any, *args: Any) -> Any:
        if tuple(text)[: len(bad)] == bad:
            raise RuntimeError("the books are wrong")
        return inner(self, text, *args)

    monkeypatch.setattr(owner, name, called)
    engine = Engine(model, SETTINGS)
    numbers = [engine.submit(request) for request in requests]
    events = list(until_done(engine))
    (failed,) = [each for each in ended(events) if each.error is not None]
    assert failed.request == numbers[5]
    assert failed.reason == "error"
    assert "the engine failed" in str(failed.error)
    assert "the books are wrong" in str(failed.error)
    told = {key: found for key, found in answers(events).items() if key[0] != failed.request}
    right = {key: found for key, found in expected(model, requests).items() if key[0] != failed.request}
    assert told == right


def test_what_goes_wrong_with_everybody_ends_everybody(
    model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SETTINGS)
    for request in requests_of(8, 6):
        engine.submit(request)
    with monkeypatch.context() as patched:
        patched.setattr(Room, "view", failing(Room.view, lambda: True, after=False))
        events = list(until_done(engine))
    assert all(each.reason == "error" for each in ended(events))
    assert len(engine.room.pool.free_slots) == engine.room.pool.slots
    # And then it serves again.
    (request,) = requests_of(9, 1)
    number = engine.submit(request)
    found = answers(list(until_done(engine)))
    assert found == {(number, k): each for (_, k), each in expected(model, [request]).items()}


def test_one_that_is_cancelled_while_the_books_are_wrong(
    model: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SETTINGS)
    requests = [Request(tuple(tokens_of(20, seed=n)), max_tokens=8, sampling=WARM, seed=n) for n in range(3)]
    first, *others = [engine.submit(request) for request in requests]
    events = [event for _ in range(4) for event in engine.step()]
    with monkeypatch.context() as patched:
        patched.setattr(Room, "keep_last", failing(Room.keep_last, lambda: True, after=False))
        events += engine.cancel(first)
    events += until_done(engine)
    (gone,) = [each for each in ended(events) if each.reason == "cancelled"]
    assert gone.request == first
    found, right = answers(events), expected(model, requests)
    assert all(found[number, 0] == right[number, 0] for number in others)
    assert engine.report().begun_anew == 1
