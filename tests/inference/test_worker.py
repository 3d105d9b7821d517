"""The engine's thread, by hand and alive."""

from __future__ import annotations

import threading

import pytest

from inference.test_engine import model_of, plain
from intarsia.errors import ConfigError, IntarsiaError
from intarsia.inference import GREEDY, Ended, Engine, EngineSettings, Produced, Request
from intarsia.inference.requests import Event
from intarsia.inference.worker import Worker
from support.small_models import VOCAB, tokens_of


def worker() -> Worker:
    return Worker(Engine(model_of("kda*3 mla"), EngineSettings(sequences=3, tokens=1000)))


def test_a_round_takes_and_tells() -> None:
    by_hand, told = worker(), list[Event]()
    assert not by_hand.turn()
    request = Request(tuple(tokens_of(5)), 3, GREEDY)
    ticket = by_hand.submit(request, told.append)
    assert (by_hand.open, told) == (1, [])
    while by_hand.turn():
        pass
    assert [e.token for e in told if isinstance(e, Produced)] == plain(by_hand.engine.model, request)
    assert isinstance(told[-1], Ended)
    assert (by_hand.open, ticket.open) == (0, 0)
    by_hand.cancel(ticket)  # too late, and no harm
    by_hand.turn()
    by_hand.engine.check_integrity()


def test_one_that_is_cancelled_before_it_began_is_told_so() -> None:
    by_hand, told = worker(), list[Event]()
    ticket = by_hand.submit(Request(tuple(tokens_of(5)), 3, count=2), told.append)
    by_hand.cancel(ticket)
    by_hand.turn()
    assert [event.reason for event in told if isinstance(event, Ended)] == ["cancelled", "cancelled"]
    assert by_hand.open == 0


def test_what_cannot_be_served_is_said_to_who_asks() -> None:
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        worker().submit(Request((VOCAB,)), lambda event: None)


def test_requests_of_many_threads() -> None:
    alive = worker()
    alive.start()
    found: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        done, tokens = threading.Event(), list[int]()

        def tell(event: Event) -> None:
            if isinstance(event, Produced):
                tokens.append(event.token)
            else:
                done.set()

        alive.submit(Request(tuple(tokens_of(4 + n % 5, seed=n % 3)), 6, GREEDY), tell)
        assert done.wait(60)
        found[n] = tokens

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alive.is_alive
    alive.stop()
    assert not alive.is_alive
    for n, tokens in found.items():
        request = Request(tuple(tokens_of(4 + n % 5, seed=n % 3)), 6, GREEDY)
        assert tokens == plain(alive.engine.model, request)
    with pytest.raises(IntarsiaError, match="has stopped"):
        alive.submit(Request((1,)), lambda event: None)


def test_who_waits_when_it_stops_is_told() -> None:
    by_hand, told = worker(), list[Event]()
    by_hand.submit(Request(tuple(tokens_of(5)), 500, count=3), told.append)
    by_hand.turn()
    by_hand.submit(Request(tuple(tokens_of(5)), 500), told.append)
    by_hand.start()
    by_hand.stop()
    reasons = [event.reason for event in told if isinstance(event, Ended)]
    assert set(reasons) <= {"cancelled", "length", "stop"}
    assert len(reasons) == 4
