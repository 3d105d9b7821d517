"""What a text need not read, since others have: counted to the token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inference.test_engine import WARM, answers, ended, model_of, plain
from intarsia.inference import GREEDY
from intarsia.inference.engine import Engine
from intarsia.inference.requests import Ended, Event, Produced, Request
from intarsia.inference.scheduler import Settings
from support.small_models import tokens_of

HYBRIDS = ["kda*3 mla", "gdn*3 attention", "mamba2", "window"]
SETTINGS = Settings(sequences=4, snapshots=30, tokens=4000, snapshot_every=1000)
hybrids = pytest.mark.parametrize("layout", HYBRIDS)


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    return events


def ask(engine: Engine, *requests: Request) -> list[Ended]:
    """Submit all and wait for all; how each ended, in their order. The answers are checked."""
    numbers = [engine.submit(request) for request in requests]
    events = drain(engine)
    found = answers(events)
    for number, request in zip(numbers, requests, strict=True):
        for k in range(request.count):
            assert found[number, k] == plain(engine.model, request, k)
    return sorted(ended(events), key=lambda each: (each.request, each.number))


def text(*parts: Sequence[int], max_tokens: int = 3) -> Request:
    return Request(tuple(token for part in parts for token in part), max_tokens, GREEDY)


@hybrids
@pytest.mark.parametrize("length", [1, 13, 64, 131])
def test_the_same_prompt_twice_is_not_read_again(layout: str, length: int) -> None:
    engine = Engine(model_of(layout), SETTINGS)
    request = Request(tuple(tokens_of(length)), 1, WARM)
    assert [each.cached for each in ask(engine, request)] == [0]
    read = engine.report().read
    assert [each.cached for each in ask(engine, request)] == [length]
    assert engine.report().read == read == length


@hybrids
@pytest.mark.parametrize("length", [7, 50])
def test_each_turn_of_a_chat_reads_what_is_new(layout: str, length: int) -> None:
    engine = Engine(model_of(layout), SETTINGS)
    said, known = tokens_of(length), 0
    for turn in range(4):
        request = text(said, max_tokens=9)
        (end,) = ask(engine, request)
        assert end.cached == known
        # The last token of an answer that its length ended has not been read.
        known = len(said) + 9 - 1
        said = [*said, *plain(engine.model, request), *tokens_of(5 + turn, seed=turn)]


@hybrids
def test_an_answer_that_ends_itself_was_read_whole(layout: str) -> None:
    engine = Engine(model_of(layout), SETTINGS)
    free = plain(engine.model, text(tokens_of(20), max_tokens=8))
    stop = next(token for token in free[2:] if token not in free[:2])
    request = Request(tuple(tokens_of(20)), 8, GREEDY, stop=frozenset({stop}))
    ask(engine, request)
    answer = plain(engine.model, request)
    assert ask(engine, text(tokens_of(20), answer, [stop, 3]))[0].cached == 20 + len(answer)


@hybrids
@pytest.mark.parametrize("length", [33, 100])
def test_where_texts_part_is_found_when_the_second_does(layout: str, length: int) -> None:
    """A linear layer cannot go back: the second reads all, and keeps a state where it leaves the first."""
    engine, document = Engine(model_of(layout), SETTINGS), tokens_of(length)
    questions = [[n, *tokens_of(6, seed=n)] for n in range(4)]
    cached = [ask(engine, text(document, question))[0].cached for question in questions]
    assert cached == [0, 0, length, length]
    assert engine.report().hits.misses == {
        "nobody has read this beginning before": 1,
        "the beginning was read before, and no state was kept where this text leaves the others": 1,
    }


@pytest.mark.parametrize("layout", ["attention", "mla"])
def test_attention_goes_back_to_any_token(layout: str) -> None:
    engine, document = Engine(model_of(layout), SETTINGS), tokens_of(61)
    questions = [[n, *tokens_of(6, seed=n)] for n in range(3)]
    assert [ask(engine, text(document, each))[0].cached for each in questions] == [0, 61, 61]
    assert ask(engine, text(document[:29], [5]))[0].cached == 29 + (document[29] == 5)
    assert ask(engine, text(document))[0].cached == 60  # the last one is read again, for its logits


@hybrids
def test_many_questions_at_once_wait_for_the_document(layout: str) -> None:
    engine, document = Engine(model_of(layout), SETTINGS), tokens_of(150)
    questions = [[n, *tokens_of(6, seed=n)] for n in range(6)]
    ends = ask(engine, *(text(document, each, max_tokens=1) for each in questions))
    assert [each.cached for each in ends] == [0] + [150] * 5
    assert engine.report().read == 150 + 6 * 7


@hybrids
def test_a_tree_of_an_agent(layout: str) -> None:
    """Each branch goes on from where it leaves its parent, and comes back to siblings."""
    engine, root = Engine(model_of(layout), SETTINGS), tokens_of(40)
    left, right = [1, *tokens_of(21, seed=1)], [2, *tokens_of(30, seed=2)]
    tips = [[n, *tokens_of(9, seed=10 + n)] for n in range(3)]
    assert ask(engine, text(root, max_tokens=1))[0].cached == 0
    assert ask(engine, text(root, left, max_tokens=1))[0].cached == 40
    assert ask(engine, text(root, right, max_tokens=1))[0].cached == 40
    for branch in (left, right):
        found = [ask(engine, text(root, branch, tip, max_tokens=1))[0].cached for tip in tips]
        assert found == [40 + len(branch)] * 3
    assert ask(engine, text(root, left, tips[1], [7], max_tokens=1))[0].cached == 40 + 22 + 10


@hybrids
def test_several_answers_share_the_reading_of_their_prompt(layout: str) -> None:
    for cache in (True, False):
        engine = Engine(model_of(layout), Settings(sequences=8, tokens=2000, prefix_cache=cache))
        request = Request(tuple(tokens_of(45)), 1, WARM, count=5)
        assert [each.cached for each in ask(engine, request)] == [0, 45, 45, 45, 45]
        assert engine.report().read == 45


def test_states_are_kept_every_so_many_tokens() -> None:
    settings = Settings(sequences=2, snapshots=30, tokens=4000, snapshot_every=32, piece=50)
    engine = Engine(model_of("kda*3 mla"), settings)
    document = tokens_of(150)
    ask(engine, text(document))
    assert ask(engine, text(document[:100], [96, 95]))[0].cached == 96


def test_what_saves_little_makes_way_first() -> None:
    """By age alone, the long text would have gone before the short ones that came after it."""
    settings = Settings(sequences=1, snapshots=4, tokens=4000, snapshot_every=5000, drafts=0)
    engine, document = Engine(model_of("gdn*3 attention"), settings), tokens_of(400)
    ask(engine, text(document))
    for n in range(3):
        ask(engine, text([n, *tokens_of(4, seed=n)]))
        assert len(engine.room.tree.snapshots()) <= 5
    assert ask(engine, text([0, *tokens_of(4, seed=0)], [3]))[0].cached == 0
    assert ask(engine, text(document, [1, 2]))[0].cached == 400


def test_memory_is_taken_once_and_stays() -> None:
    engine = Engine(model_of("gdn*3 attention"), Settings(sequences=2, snapshots=5, tokens=320))
    before = engine.report()
    for n in range(12):
        ask(engine, text([n, *tokens_of(90, seed=n)]))
    after = engine.report()
    assert (after.state_bytes, after.page_bytes) == (before.state_bytes, before.page_bytes)
    assert engine.room.pool.nbytes == before.state_bytes + before.page_bytes
    cost = engine.model.model.cost()
    assert before.state_bytes == 9 * cost.state_bytes(0)
    # Each sequence may begin a page that it does not fill.
    assert before.page_bytes == cost.state_bytes(320 + 9 * 16) - cost.state_bytes(0)
    engine.room.clear()
    engine.check_integrity()
    assert engine.report().used_pages == 0


def test_a_text_that_is_cancelled_leaves_what_it_read() -> None:
    engine, document = Engine(model_of("kda*3 mla"), SETTINGS), tokens_of(700)
    number = engine.submit(text(document))
    other = engine.submit(Request(tuple(tokens_of(9, seed=1)), 5, GREEDY, count=2))
    events = engine.step()
    (end,) = engine.cancel(number)
    assert (end.reason, end.tokens, end.prompt) == ("cancelled", 0, 700)
    assert engine.cancel(number) == []
    engine.check_integrity()
    events += drain(engine)
    assert {e.request for e in events if isinstance(e, Produced)} == {other}
    assert ask(engine, text(document))[0].cached == 512  # the older one came first
