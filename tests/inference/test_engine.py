"""Many requests at once give what each would give alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from intarsia.errors import ConfigError, IntarsiaError
from intarsia.inference import GREEDY, Sampling, generate
from intarsia.inference.drafts import DraftModel, Drafts, LookUp
from intarsia.inference.engine import Engine
from intarsia.inference.requests import Ended, Event, Produced, Request
from intarsia.inference.scheduler import Settings
from intarsia.model import InferenceModel, LanguageModel
from support.small_models import VOCAB, build, tokens_of

HYBRIDS = ["kda*3 mla", "gdn*3 attention", "lightning", "mamba2", "window", "attention", "mla", "kda dsa"]
WARM = Sampling(temperature=1.3, top_p=0.95)


def model_of(layout: str, seed: int = 0) -> InferenceModel:
    """In float64: whatever runs beside a text changes its logits by rounding, which must choose no other token."""
    return InferenceModel(build(layout, seed).double())


def plain(model: InferenceModel, request: Request, number: int = 0) -> list[int]:
    """The answer of that number, from the model alone."""
    return list(
        generate(
            model, request.prompt, max_tokens=request.max_tokens, sampling=request.sampling,
            seed=request.seed + number, stop=request.stop,
        )
    )  # fmt: skip


def answers(events: Sequence[Event]) -> dict[tuple[int, int], list[int]]:
    """The tokens of each answer that has ended."""
    found: dict[tuple[int, int], list[int]] = {
        (e.request, e.number): [] for e in events if isinstance(e, Ended)
    }
    for event in events:
        if isinstance(event, Produced):
            found[event.request, event.number].append(event.token)
    return found


def run(engine: Engine, *requests: Request) -> dict[tuple[int, int], list[int]]:
    for request in requests:
        engine.submit(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    return answers(events)


def ended(events: Sequence[Event]) -> list[Ended]:
    return [event for event in events if isinstance(event, Ended)]


def requests_of(seed: int, count: int = 12) -> list[Request]:
    """Prompts some of which begin alike, or are the same."""
    chance = random.Random(seed)
    beginnings = [tokens_of(n, seed=n) for n in (3, 17, 41, 64)]
    requests = []
    for n in range(count):
        begin = chance.choice(beginnings)[: chance.randrange(1, 65)]
        own = tokens_of(chance.randrange(0, 30), seed=1000 + chance.randrange(4))
        requests.append(
            Request(
                prompt=(*begin, *own), max_tokens=chance.randrange(1, 12), seed=n,
                sampling=chance.choice([GREEDY, WARM]), stop=frozenset(chance.sample(range(VOCAB), 2)),
                count=chance.choice([1, 1, 1, 2, 3]), priority=chance.choice([0, 0, 1]),
            )
        )  # fmt: skip
    return requests


def expected(model: InferenceModel, requests: Sequence[Request]) -> dict[tuple[int, int], list[int]]:
    return {(n, k): plain(model, each, k) for n, each in enumerate(requests) for k in range(each.count)}


@pytest.mark.parametrize("layout", HYBRIDS)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 64, 512])
def test_answers_are_those_of_the_model_alone(layout: str, cache: bool, piece: int) -> None:
    model, requests = model_of(layout), requests_of(piece)
    engine = Engine(
        model,
        Settings(sequences=5, snapshots=20, tokens=2000, piece=piece, prefix_cache=cache, snapshot_every=32),
    )
    assert run(engine, *requests) == expected(model, requests)
    again = run(engine, *requests)
    assert {(n - len(requests), k): ids for (n, k), ids in again.items()} == expected(model, requests)
    assert (engine.report().hits.saved_tokens > 0) == cache


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


def test_long_prompts_hold_up_nobody() -> None:
    """A text that is being continued gets a token in every step while a long prompt is read."""
    engine = Engine(model_of("kda*3 mla"), Settings(sequences=3, tokens=4000, step_tokens=64))
    engine.submit(Request(tuple(tokens_of(5)), 40, GREEDY))
    engine.step()
    long = engine.submit(Request(tuple(tokens_of(900, seed=1)), 3, GREEDY))
    for _ in range(14):
        assert [event.request for event in engine.step() if isinstance(event, Produced)] == [0]
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", HYBRIDS)
def test_thousands_of_requests(layout: str) -> None:
    """Whatever comes together, each gets what the model alone gives, and no memory is lost."""
    model = model_of(layout)
    chance = random.Random(layout)
    known: dict[tuple[Any, ...], list[int]] = {}
    for round_ in range(30):
        settings = Settings(
            sequences=chance.randrange(1, 9), snapshots=chance.choice([0, 3, 30]),
            tokens=chance.choice([150, 600, 3000]), page_size=chance.choice([4, 16]),
            step_tokens=chance.choice([9, 64, 512]), piece=chance.choice([1, 7, 512]),
            prefix_cache=chance.random() < 0.8, snapshot_every=chance.choice([10, 1000]),
            drafts=chance.choice([0, 2, 5]),
        )  # fmt: skip
        engine = Engine(
            model, settings, chance.choice([None, LookUp(2, 1), DraftModel(model_of("kda", 1), 4, 600)])
        )
        wanted, found = requests_of(round_, 50), []
        waiting, gone = [*wanted], set()
        while waiting or engine.has_work:
            for _ in range(chance.randrange(4)):
                if waiting:
                    engine.submit(waiting.pop(0))
            if chance.random() < 0.01 and (begun := len(wanted) - len(waiting)):
                gone.add(chance.randrange(begun))
                found += engine.cancel(max(gone))
            found += engine.step()
            engine.check_integrity()
        for (number, k), answer in answers(found).items():
            if number not in gone:
                request = wanted[number]
                key = (request.prompt, request.max_tokens, request.sampling, request.seed + k, request.stop)
                if key not in known:
                    known[key] = plain(model, request, k)
                assert answer == known[key]
        assert len(answers(found)) == sum(request.count for request in wanted)
        engine.room.clear()
        assert len(engine.room.pool.free_slots) == engine.room.pool.slots
        assert engine.report().used_pages == 0
