"""Many sequences of different lengths together, as if each were alone: in values and in pools."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch

from intarsia.errors import PoolError, ShapeError, UnsupportedError
from intarsia.inference import GREEDY, Sampling, generate
from intarsia.model import InferenceModel, LanguageModel, ModelStates
from intarsia.ops import Sequences
from support.small_models import LAYOUTS, SMALLEST, VOCAB, build, preset, recurrent, tokens_of

every_model = pytest.mark.parametrize("name", [*LAYOUTS, *SMALLEST])
PROMPTS = [tokens_of(n, seed=n) for n in (5, 1, 70, 3)]


def model_of(name: str) -> LanguageModel:
    return preset(name) if name in SMALLEST else build(name).double()


@every_model
@pytest.mark.parametrize("chunk", [None, 2])
def test_several_prompts_are_continued_as_if_each_were_alone(name: str, chunk: int | None) -> None:
    model = InferenceModel(model_of(name))
    options: dict[str, Any] = {"max_tokens": 6, "sampling": Sampling(temperature=1.2), "prefill_chunk": chunk}
    found: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in generate(model, PROMPTS, seed=7, **options):
        found[number].append(token)
    assert found == [list(generate(model, p, seed=7 + n, **options)) for n, p in enumerate(PROMPTS)]


def test_each_prompt_has_its_own_end_and_seed() -> None:
    model = build("kda gdn").double()
    free = [list(generate(model, p, max_tokens=8, sampling=GREEDY)) for p in PROMPTS]
    stop = free[0][2]
    found: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in generate(model, PROMPTS, max_tokens=8, sampling=GREEDY, stop={stop}):
        found[number].append(token)
    assert found == [text[: text.index(stop)] if stop in text else text for text in free]
    assert len(found[0]) < 8
    drawn = [token for _, token in generate(model, [[1, 2], [1, 2]], max_tokens=9, seed=[3, 3])]
    assert drawn[::2] == drawn[1::2]
    assert drawn[::2] == list(generate(model, [1, 2], max_tokens=9, seed=3))


def test_several_prompts_go_on_from_states_that_stay() -> None:
    model = build("kda gla").double()
    prefixes = [tokens_of(n, seed=n) for n in (40, 3)]
    each = [model(torch.tensor([p]), states=model.init_states(1)).states for p in prefixes]
    states = ModelStates.concatenate(each)
    for _ in range(2):
        pairs = list(generate(model, [[5, 6], [7]], max_tokens=4, sampling=GREEDY, states=states))
        assert [token for number, token in pairs if number == 1] == list(
            generate(model, [7], max_tokens=4, sampling=GREEDY, states=each[1])
        )
    assert states.tokens == (40, 3)
    with pytest.raises(Exception, match="got 2 for 1"):
        generate(model, [[1]], states=states)


def packed(*pieces: list[int]) -> tuple[torch.Tensor, Sequences]:
    return torch.tensor([[token for piece in pieces for token in piece]]), Sequences(tuple(map(len, pieces)))


@every_model
def test_pooled_is_value_and_what_left_comes_back(name: str) -> None:
    """Logits of all tokens and of the last, after a fork, and after an eviction: of linear mixers to the bit."""
    model = InferenceModel(model_of(name))
    exact = recurrent(model.model)
    pool, slots = model.new_pool(5, 400), [4, 1, 2]
    for slot in slots:
        pool.take(slot)
    states, seed = model.init_states(3), 0

    def go_on(*lengths: int, last_only: bool = True) -> None:
        nonlocal states, seed
        seed += 1
        row, seqs = packed(*(tokens_of(n, seed=seed * 10 + i) for i, n in enumerate(lengths)))
        expected = model(row, states, seqs, last_only=last_only)
        got = model(row, pool.view(slots), seqs, last_only=last_only)
        if exact:
            assert torch.equal(got.logits, expected.logits)
        else:
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-6, atol=1e-6)
        assert got.logits.shape == (1, len(lengths) if last_only else sum(lengths), VOCAB)
        states = expected.states
        assert pool.tokens(slots) == states.tokens

    go_on(5, 1, 70)
    go_on(1, 1, 1)
    go_on(0, 3, 1, last_only=False)
    slots.append(pool.fork(1))
    states = states.select([0, 1, 2, 1])
    go_on(1, 4, 1, 1)
    away = pool.evict([4, 2])
    assert away.tokens == (states.tokens[0], states.tokens[2])
    pool.take(4)
    model(torch.tensor([[3, 4]]), pool.view([4]))
    pool.free(1)  # and room is made
    slots = [pool.restore(away)[0], slots[3]]
    states = states.select([0, 3])
    go_on(1, 1)
    if exact:
        assert pool.nbytes == 5 * model.init_states(1).nbytes()


@pytest.mark.parametrize("name", ["kda*3 mla", "gdn kda attention mla"])
def test_what_cannot_be_leaves_all_layers_of_a_pool_as_they_were(name: str) -> None:
    """A full pool in the last layer, a roll back that the first cannot do, a row without a token to tell of."""
    model = InferenceModel(build(name).double())
    pool = model.new_pool(3, 16)
    slots = [pool.take(), pool.take()]
    row, seqs = packed([1, 2, 3], [4])
    model(row, pool.view(slots), seqs)
    before = pool.view(slots).snapshot()
    long = tokens_of(100)
    row, seqs = packed(long, [1])
    value = model(torch.tensor([long]), model.init_states(1)).states
    for error, message, attempt in (
        (PoolError, "the pool is full", lambda: model(row, pool.view(slots), seqs)),
        (PoolError, "the pool is full", lambda: pool.restore(value)),
        (UnsupportedError, "keep the state", lambda: pool.view(slots).truncated((1, 1))),
        (ShapeError, "has no token", lambda: model(torch.tensor([[1]]), pool.view(slots), Sequences((1, 0)))),
        (ShapeError, "2 sequences", lambda: model(row, pool.view(slots), Sequences((101,)))),
    ):
        with pytest.raises(error, match=message):
            attempt()
        assert pool.tokens(slots) == (3, 1)
        assert pool.free_slots == (2,)
        for layer, kept in zip(pool.view(slots).layers, before.layers, strict=True):
            for key, tensor in kept.tensors().items():
                assert torch.equal(layer.tensors()[key], tensor)
    row, seqs = packed([5], [6])
    model(row, pool.view(slots), seqs)


@every_model
def test_threads_on_one_prefix_give_what_one_gives(name: str) -> None:
    model = InferenceModel(model_of(name))
    prefix = model(torch.tensor([tokens_of(20)]), model.init_states(1)).states

    def draw(seed: int) -> list[int]:
        return list(generate(model, [1], max_tokens=5, seed=seed, states=prefix))

    expected, found = [draw(seed) for seed in range(3)], [[] for _ in range(3)]

    def run(seed: int) -> None:
        found[seed] = draw(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize("name", ["kda*3 mla", "gdn kda attention mla", "window"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_texts_go_on_in_a_pool_as_from_values(
    name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, also where the pool was too small; and where some end, their pages are free for the others."""
    model = InferenceModel(build(name).double())
    sampling = Sampling(temperature=1.2)
    expected = list(
        generate(
            model, PROMPTS, max_tokens=30, sampling=sampling, states=model.init_states(4), prefill_chunk=chunk
        )
    )
    made: list[int] = []
    new_pool = InferenceModel.new_pool

    def counted(self: InferenceModel, slots: int, tokens: int = 0) -> Any:
        made.append(slots)
        return new_pool(self, slots, tokens)

    monkeypatch.setattr(InferenceModel, "new_pool", counted)
    assert list(generate(model, PROMPTS, max_tokens=30, sampling=sampling, prefill_chunk=chunk)) == expected
    assert made == [4]
    monkeypatch.setattr(sys.modules[generate.__module__], "AHEAD", 1)
    assert list(generate(model, PROMPTS, max_tokens=30, sampling=sampling, prefill_chunk=chunk)) == expected
    assert len(made) > 2


def test_texts_go_on_in_the_pool_that_is_given() -> None:
    model = InferenceModel(build("kda gla attention").double())
    pool, prefixes = model.new_pool(3, 500), [tokens_of(40), tokens_of(3)]
    slots = [pool.take(2), pool.take(0)]
    row, seqs = packed(*prefixes)
    value = model(row, model.init_states(2), seqs).states
    model(row, pool.view(slots), seqs)
    texts: dict[str, list[tuple[int, int]]] = {}
    for how, states in (("value", value), ("pool", pool.view(slots))):
        texts[how] = list(
            generate(model, [[5], [7]], max_tokens=9, seed=3, stop={4, 9, 30, 31}, states=states)
        )
    assert texts["pool"] == texts["value"]
    assert value.tokens == (40, 3)
    assert all(seen > before for seen, before in zip(pool.tokens(slots), (40, 3), strict=True))
