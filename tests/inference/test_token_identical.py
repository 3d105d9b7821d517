"""Whatever is cached, cut in pieces, guessed or interrupted: each gets what the model alone gives."""

from __future__ import annotations

import random

import pytest

from intarsia.inference.drafts import DraftModel, Drafts, LookUp
from intarsia.inference.engine import Engine
from intarsia.inference.requests import Event
from intarsia.inference.scheduler import Settings
from intarsia.model import InferenceModel
from support.engine_cases import (
    HYBRIDS,
    SPARSE,
    Alone,
    answers,
    make_way,
    model_of,
    requests_of,
    run,
)

ROUNDS, TOGETHER = 17, 50
"""Of each layout: with twelve layouts, more than ten thousand requests."""


@pytest.fixture(scope="module", params=[*HYBRIDS, *SPARSE])
def alone(request: pytest.FixtureRequest) -> tuple[InferenceModel, Alone]:
    """A model, and what it answers alone: once for all that is compared with it."""
    model = model_of(request.param)
    return model, Alone(model)


@pytest.mark.parametrize("guess", [False, True], ids=["", "guessing"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["", "making way"])
@pytest.mark.parametrize("piece", [1, 7, 64, 512])
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not cached"])
def test_answers_are_those_of_the_model_alone(
    alone: tuple[InferenceModel, Alone], cache: bool, piece: int, interrupted: bool, guess: bool
) -> None:
    """Twice the same requests, greedy and drawn, of one answer and several, with common beginnings: behind nothing that
    was kept, and behind all of it."""
    model, right = alone
    requests = requests_of(piece, 4)
    settings = Settings(
        sequences=5, snapshots=20, tokens=2000, piece=piece, prefix_cache=cache, snapshot_every=32, drafts=2
    )
    engine = Engine(model, settings, LookUp(2, 1) if guess else None)
    every = 4 if interrupted else 0
    assert run(engine, *requests, make_way_every=every) == right.answers(requests)
    again = run(engine, *requests, make_way_every=every)
    assert again == right.answers(requests, first=len(requests))
    report = engine.report()
    assert (report.hits.saved_tokens > 0) == cache
    assert (report.preempted > 0) == interrupted
    assert (report.guessed > 0) == guess
    engine.room.clear()
    assert len(engine.room.pool.free_slots) == engine.room.pool.slots


@pytest.mark.slow
def test_ten_thousand_requests(alone: tuple[InferenceModel, Alone]) -> None:
    """Randomised, with all settings: each that was not cancelled gets its answer, and no memory is lost. All layouts
    together are ten thousand."""
    model, right = alone
    chance = random.Random(str(model.config.layout))
    saved = preempted = guessed = 0
    for round_ in range(ROUNDS):
        settings = Settings(
            sequences=chance.randrange(1, 9), snapshots=chance.choice([0, 3, 30]),
            tokens=chance.choice([150, 600, 3000]), page_size=chance.choice([4, 16]),
            step_tokens=chance.choice([9, 64, 512]), piece=chance.choice([1, 7, 512]),
            prefix_cache=chance.random() < 0.8, snapshot_every=chance.choice([10, 1000]),
            drafts=chance.choice([0, 2, 5]),
        )  # fmt: skip
        guesses: list[Drafts | None] = [None, LookUp(2, 1), DraftModel(model_of("kda", 1), 4, 600)]
        engine = Engine(model, settings, chance.choice(guesses))
        wanted = requests_of(round_, TOGETHER)
        found: list[Event] = []
        waiting, gone = [*wanted], set[int]()
        while waiting or engine.has_work:
            for _ in range(chance.randrange(4)):
                if waiting:
                    engine.submit(waiting.pop(0))
            if chance.random() < 0.01 and (begun := len(wanted) - len(waiting)):
                number = chance.randrange(begun)
                gone.add(number)
                found += engine.cancel(number)
            found += engine.step()
            if chance.random() < 0.05:
                make_way(engine)
            engine.check_integrity()
        given, wanted_answers = answers(found), right.answers(wanted)
        assert given.keys() == wanted_answers.keys()
        for key, answer in given.items():
            # One that was cancelled has the beginning of its answer.
            right_answer = wanted_answers[key]
            assert answer == (right_answer[: len(answer)] if key[0] in gone else right_answer)
        report = engine.report()
        saved, preempted = saved + report.hits.saved_tokens, preempted + report.preempted
        guessed += report.guessed
        engine.room.clear()
        assert len(engine.room.pool.free_slots) == engine.room.pool.slots
        assert engine.report().used_pages == 0
    assert saved > 0
    assert preempted > 0
    assert guessed > 0
