"""Prompts are read in pieces that leave those who wait for a token in time."""

from __future__ import annotations

import pytest

from inference.test_engine import model_of, plain
from intarsia.errors import ConfigError
from intarsia.inference import GREEDY, Engine, EngineSettings, Produced, Request
from intarsia.inference.pace import LEAST, Pace
from support.small_models import tokens_of

A_TOKEN = 0.001


class Slow:
    """An engine on a machine where each token takes a millisecond."""

    def __init__(self, **settings: float) -> None:
        self.engine = Engine(
            model_of("kda*3 mla"),
            EngineSettings(sequences=4, tokens=2000, step_tokens=256, piece=256, drafts=0, **settings),  # type: ignore[arg-type]
            clock=lambda: self.engine.report().read * A_TOKEN,
        )

    def steps(self) -> list[tuple[int, int]]:
        """Of each step how many tokens it read, and how many it produced."""
        found, before = [], self.engine.report()
        while self.engine.has_work:
            self.engine.step()
            after = self.engine.report()
            found.append((after.read - before.read, after.produced - before.produced))
            before = after
        return found


def test_a_long_prompt_beside_one_that_is_continued() -> None:
    slow = Slow(step_seconds=0.05)
    chat, document = (
        Request(tuple(tokens_of(200)), 40, GREEDY),
        Request(tuple(tokens_of(700, seed=1)), 4, GREEDY),
    )
    slow.engine.submit(chat)
    slow.engine.step()
    assert slow.engine.report().read == 200  # nobody waits
    slow.engine.submit(document)
    steps = slow.steps()
    beside = [read for read, _ in steps if read > 2]
    assert all(read <= 52 for read in beside)
    assert sum(read >= 45 for read in beside) >= 12
    assert all(produced >= 1 for _, produced in steps)


def test_without_it_the_tokens_of_a_step_decide() -> None:
    slow = Slow()
    slow.engine.submit(Request(tuple(tokens_of(200)), 40, GREEDY))
    slow.engine.step()
    slow.engine.submit(Request(tuple(tokens_of(700, seed=1)), 4, GREEDY))
    assert max(read for read, _ in slow.steps()) == 256


def test_answers_are_the_same() -> None:
    requests = [Request(tuple(tokens_of(300 + n, seed=n)), 12, GREEDY) for n in range(4)]
    slow = Slow(step_seconds=0.03)
    numbers = [slow.engine.submit(each) for each in requests]
    events = list(slow.engine.run())
    for number, request in zip(numbers, requests, strict=True):
        tokens = [e.token for e in events if isinstance(e, Produced) and e.request == number]
        assert tokens == plain(slow.engine.model, request)


def test_a_pace_is_learned() -> None:
    pace = Pace(0.1)
    assert pace.tokens(512) == 512  # nothing is known
    pace.note(100, False, 0.1)
    assert pace.tokens(512) == 100
    for _ in range(50):
        pace.note(0, True, 0.02)
        pace.note(40, True, 0.02 + 0.04)
    assert pace.tokens(512) == pytest.approx(80, abs=1)
    assert pace.tokens(64) == 64
    for _ in range(50):
        pace.note(0, True, 0.5)  # those who are continued alone take longer than that
    assert pace.tokens(512) == LEAST


def test_a_pace_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="step_seconds must be above 0"):
        EngineSettings(step_seconds=0)
