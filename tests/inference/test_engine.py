"""Many requests at once give what each would give alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from intarsia.errors import ConfigError, IntarsiaError
from intarsia.inference import GREEDY
from intarsia.inference.drafts import DraftModel, Drafts, LookUp
from intarsia.inference.engine import Engine
from intarsia.inference.requests import Ended, Produced, Request
from intarsia.inference.scheduler import Settings
from intarsia.model import InferenceModel, LanguageModel
from support.engine_cases import HYBRIDS, WARM, answers, ended, expected, model_of, plain, requests_of, run
from support.small_models import VOCAB, build, tokens_of


@pytest.mark.parametrize("layout", HYBRIDS)
@pytest.mark.parametrize("drafts", [LookUp(), None], ids=["look up", "nothing"])
def test_bfloat16_reads_and_continues_together(layout: str, drafts: Drafts | None) -> None:
    engine = Engine(
        InferenceModel(build(layout).bfloat16()), Settings(sequences=5, tokens=2000, piece=7), drafts
    )
    for request in requests_of(3):
        engine.submit(request)
    told = ended(list(engine.run()))
    assert [each.error for each in told if each.error] == []
    assert len(told) == sum(request.count for request in requests_of(3))
    engine.check_integrity()


@pytest.mark.parametrize("layout", HYBRIDS)
@pytest.mark.parametrize("drafts", ["look up", "model"])
def test_guessing_ahead_changes_nothing(layout: str, drafts: str) -> None:
    model, requests = model_of(layout), requests_of(3)
    guesses: Drafts = LookUp(2, 1) if drafts == "look up" else DraftModel(model_of("kda"), 8, 2000)
    engine = Engine(model, Settings(sequences=4, snapshots=9, tokens=2000, step_tokens=64), guesses)
    assert run(engine, *requests) == expected(model, requests)
    report = engine.report()
    assert report.guessed > 0
    assert report.hits.saved_tokens > 0


@pytest.mark.parametrize("layout", HYBRIDS)
def test_a_model_that_guesses_its_own_tokens_is_always_right(layout: str) -> None:
    model = model_of(layout)
    engine = Engine(model, Settings(sequences=4, tokens=2000), DraftModel(model, 8, 2000))
    requests = [Request(tuple(tokens_of(n)), 20, GREEDY) for n in (5, 30, 11)]
    assert run(engine, *requests) == expected(model, requests)
    report = engine.report()
    assert report.confirmed == report.guessed > 20
    assert report.steps < 12


@pytest.mark.parametrize("layout", ["kda*3 mla", "window", "attention", "gdn*3 attention"])
@pytest.mark.parametrize("guess", [True, False])
def test_texts_make_way_and_come_back(layout: str, guess: bool) -> None:
    """Memory for one and a half of the texts that run."""
    model = model_of(layout)
    requests = [Request(tuple(tokens_of(3 + n, seed=n)), 60, WARM, seed=n, priority=n % 2) for n in range(7)]
    settings = Settings(sequences=4, snapshots=3, tokens=100, page_size=4, step_tokens=40, piece=16)
    engine = Engine(model, settings, LookUp(2, 1) if guess else None)
    assert run(engine, *requests) == expected(model, requests)
    assert engine.report().preempted > 0


@pytest.mark.parametrize("layout", ["kda*3 mla", "attention"])
def test_what_goes_wrong_with_one_text_is_not_noticed_by_others(layout: str) -> None:
    model, requests = model_of(layout), requests_of(2, 6)
    engine = Engine(model, Settings(sequences=4, tokens=2000))

    class Refuses:
        def allowed(self) -> torch.Tensor:
            return torch.zeros(VOCAB, dtype=torch.bool)

        def accept(self, token: int) -> None:
            raise AssertionError("nothing was allowed")

    bad = engine.submit(Request(tuple(tokens_of(9)), 5, constraint=Refuses))
    numbers = [engine.submit(request) for request in requests]
    events = list(engine.run())
    engine.check_integrity()
    (failed,) = [event for event in ended(events) if event.request == bad]
    assert failed.reason == "error"
    assert "forbid every token" in str(failed.error)
    found = answers(events)
    for number, request in zip(numbers, requests, strict=True):
        assert [found[number, k] for k in range(request.count)] == [
            plain(model, request, k) for k in range(request.count)
        ]


def test_a_model_that_fails_takes_its_step_along_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = model_of("kda*3 mla"), Request(tuple(tokens_of(20)), 5, GREEDY, count=2)
    engine = Engine(model, Settings(sequences=4, tokens=2000), LookUp(2, 1))
    right: Callable[..., Any] = model.model.forward

    def fails(tokens: torch.Tensor, **options: Any) -> Any:
        output = right(tokens, **options)
        if tokens.shape[1] == 40:
            raise RuntimeError("a kernel has failed")
        return output

    monkeypatch.setattr(model.model, "forward", fails)
    bad = engine.submit(Request(tuple(tokens_of(40, seed=1)), 5, count=2))
    (first, second) = ended(engine.step())
    assert (first.request, second.number) == (bad, 1)
    assert "a kernel has failed" in str(first.error)
    assert isinstance(first.error, IntarsiaError)
    assert isinstance(first.error.__cause__, RuntimeError)
    engine.check_integrity()
    assert len(engine.room.pool.free_slots) == engine.room.pool.slots
    assert run(engine, request) == {(1, 0): plain(model, request), (1, 1): plain(model, request, 1)}


@pytest.mark.parametrize("layout", ["kda*3 mla", "gdn*3 attention", "window"])
def test_others_of_a_step_that_failed_are_read_again(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model fails with one text, wherever it stands in the row, when states have been written already."""
    model, requests, fault = model_of(layout), requests_of(5, 9), [5, 5, 5, 5]
    right = expected(model, requests)
    engine = Engine(model, Settings(sequences=6, tokens=2000), LookUp(2, 1))
    forward: Callable[..., Any] = model.model.forward

    def fails(tokens: torch.Tensor, **options: Any) -> Any:
        output = forward(tokens, **options)
        row = tokens[0].tolist()
        if any(row[n : n + len(fault)] == fault for n in range(len(row))):
            raise RuntimeError("a kernel has failed")
        return output

    for request in requests[:4]:
        engine.submit(request)
    first = engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(model.model, "forward", fails)
        bad = engine.submit(Request((*tokens_of(20), *fault, 1), 5, priority=1))
        events = [*first, *engine.step()]
        assert ended(events) == ended(first)  # more than one was in it
        engine.check_integrity()
        for request in requests[4:]:
            engine.submit(request)
        while engine.has_work:
            events += engine.step()
            engine.check_integrity()
    found = answers(events)
    assert found.pop((bad, 0)) == []
    (failed,) = [each for each in ended(events) if each.error is not None]
    assert failed.request == bad
    assert "a kernel has failed" in str(failed.error)
    assert {(n - (n > bad), k): ids for (n, k), ids in found.items()} == right


def test_long_prompts_hold_up_nobody() -> None:
    """A text that is being continued gets a token in every step while a long prompt is read."""
    engine = Engine(model_of("kda*3 mla"), Settings(sequences=3, tokens=4000, step_tokens=64))
    engine.submit(Request(tuple(tokens_of(5)), 40, GREEDY))
    engine.step()
    long = engine.submit(Request(tuple(tokens_of(900, seed=1)), 3, GREEDY))
    unread = engine.report().unread
    assert unread == 900
    for _ in range(14):
        assert [event.request for event in engine.step() if isinstance(event, Produced)] == [0]
        before, unread = unread, engine.report().unread
        assert 0 < before - unread <= 64
    assert long in [event.request for event in engine.step() if isinstance(event, Produced)]


def test_priority_comes_before_age() -> None:
    engine = Engine(model_of("gdn*3 attention"), Settings(sequences=1, tokens=400))
    numbers = [engine.submit(Request(tuple(tokens_of(4)), 2, priority=p)) for p in (0, 1, 0, 1)]
    order = [event.request for event in engine.run() if isinstance(event, Ended)]
    assert order == [numbers[1], numbers[3], numbers[0], numbers[2]]


def test_log_probabilities_are_the_models() -> None:
    model = model_of("kda*3 mla")
    engine = Engine(model, Settings(tokens=400), LookUp(2, 1))
    prompt = tokens_of(12)
    engine.submit(Request(tuple(prompt), 6, WARM, logprobs=4))
    events = [event for event in engine.run() if isinstance(event, Produced)]
    whole = torch.tensor([[*prompt, *(event.token for event in events)]])
    logits = model(whole, last_only=False).logits
    assert logits is not None
    for event, row in zip(events, torch.log_softmax(logits[0, 11:], -1), strict=False):
        assert event.logprobs is not None
        assert event.logprobs.token == pytest.approx(float(row[event.token]), abs=1e-9)
        top = row.topk(4)
        assert [token for token, _ in event.logprobs.top] == top.indices.tolist()
        assert [p for _, p in event.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-9)


def test_answers_obey_a_constraint_also_where_tokens_are_guessed() -> None:
    class Rising:
        """Each token is larger than the one before."""

        def __init__(self) -> None:
            self.last = -1

        def allowed(self) -> torch.Tensor:
            return torch.arange(VOCAB) > self.last

        def accept(self, token: int) -> None:
            assert token > self.last
            self.last = token

    request = Request(tuple(tokens_of(9)), 4, WARM, count=3, constraint=Rising)
    model = model_of("kda*3 mla")
    without = run(Engine(model, Settings(tokens=400)), request)
    with_guesses = run(Engine(model, Settings(tokens=400), DraftModel(model, 4, 400)), request)
    assert without == with_guesses
    assert all(answer == sorted(set(answer)) for answer in without.values())


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("holds no token", lambda: Request(())),
        ("max_tokens must be at least 1", lambda: Request((1,), 0)),
        ("count must be at least 1", lambda: Request((1,), count=0)),
        ("logprobs must be at least 0", lambda: Request((1,), logprobs=-1)),
        ("step_tokens must be at least sequences", lambda: Settings(sequences=8, step_tokens=7)),
        ("tokens must be at least 1", lambda: Settings(tokens=0)),
        ("snapshots must not be negative", lambda: Settings(snapshots=-1)),
        ("shortest must be from 1", lambda: LookUp(2, 3)),
        ("outside the vocabulary", lambda: Engine(model_of("kda")).submit(Request((1, VOCAB)))),
        (
            "has memory for 16",
            lambda: Engine(model_of("kda"), Settings(tokens=16)).submit(Request((1,) * 16)),
        ),
        ("must have one tokenizer", lambda: Engine(model_of("kda"), drafts=DraftModel(other(), 2, 100))),
    ],
)
def test_what_cannot_be_is_said_at_once(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def other() -> InferenceModel:
    model: LanguageModel = build("kda", vocab_size=50)
    return InferenceModel(model)
