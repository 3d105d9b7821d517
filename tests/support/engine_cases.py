"""An engine's answers, and what they must be: those of the model alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from intarsia.inference import GREEDY, Sampling, generate
from intarsia.inference.engine import Engine
from intarsia.inference.requests import Ended, Event, Produced, Request
from intarsia.model import InferenceModel
from support.small_models import VOCAB, build, tokens_of

HYBRIDS = ["kda*3 mla", "gdn*3 attention", "lightning", "mamba2", "window", "attention", "mla", "kda dsa"]
SPARSE = ["kda dsa-of-pools", "kda qsa", "kda msa", "gdn nsa"]
"""Which read only some of what was before, of hybrids."""
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


def run(engine: Engine, *requests: Request, make_way_every: int = 0) -> dict[tuple[int, int], list[int]]:
    """The answers to requests that come at once.

    Args:
        make_way_every: in each so many steps a text that runs must wait; 0: where memory is too small alone.
    """
    for request in requests:
        engine.submit(request)
    events: list[Event] = []
    for n in itertools.count(1):
        if not engine.has_work:
            # What went wrong in the engine's books is mended where it stands, and would not be seen in the answers.
            assert engine.report().begun_anew == 0
            return answers(events)
        events += engine.step()
        if make_way_every and n % make_way_every == 0:
            make_way(engine)
        engine.check_integrity()
    raise AssertionError("the loop above has no end of its own")


def make_way(engine: Engine) -> None:
    """Let the last of several texts that run wait, as if another needed its memory."""
    if len(engine._scheduler.running) > 1:
        engine._make_wait(engine._scheduler.last)


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


class Alone:
    """What a model alone answers, each thing once."""

    def __init__(self, model: InferenceModel) -> None:
        self._model = model
        self._known: dict[tuple[object, ...], list[int]] = {}

    def answer(self, request: Request, number: int) -> list[int]:
        """Of that number."""
        key = (
            request.prompt, request.max_tokens, request.sampling, request.seed + number, request.stop
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = plain(self._model, request, number)
        return self._known[key]

    def answers(self, requests: Sequence[Request], first: int = 0) -> dict[tuple[int, int], list[int]]:
        """Of requests that are numbered through from `first` on."""
        return {
            (n, k): self.answer(each, k) for n, each in enumerate(requests, first) for k in range(each.count)
        }


def expected(model: InferenceModel, requests: Sequence[Request]) -> dict[tuple[int, int], list[int]]:
    return Alone(model).answers(requests)
