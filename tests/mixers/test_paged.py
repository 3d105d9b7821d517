"""Pools of pages: whatever is done with its sequences, each is what it would be as a value, and no page is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, IntarsiaError, PoolError, ShapeError, UnsupportedError
from intarsia.layers.books import Books
from intarsia.layers.growing import GrowingMemory, GrowingState, PagedPool
from intarsia.mixers import Mixer
from intarsia.ops import Sequences, native
from support.device import device
from support.mixer_cases import CASES, D_MODEL, build

GROWING = [case for case in CASES if isinstance(build(case).init_state(1), GrowingState)]
every_growing = pytest.mark.parametrize("case", GROWING)
SLOTS = 4


def memory_of(mixer: Mixer) -> GrowingMemory:
    memory = mixer.memory
    assert isinstance(memory, GrowingMemory)
    return memory


def new_pool(mixer: Mixer, tokens: int = 1000, page_size: int = 8) -> PagedPool:
    pool = mixer.new_pool(SLOTS, tokens, page_size)
    assert isinstance(pool, PagedPool)
    return pool


def tokens(T: int, seed: int = 0) -> Tensor:
    x = torch.randn(1, 200, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[:, :T].to(device())


def same(pool: PagedPool, values: dict[int, GrowingState]) -> None:
    pool.check_integrity()
    assert pool.free_slots == tuple(slot for slot in range(SLOTS) if slot not in values)
    for slot, value in values.items():
        view = pool.view([slot])
        assert view.tokens == value.tokens
        assert view.nbytes() == value.nbytes()
        held, wanted = view.tensors(), value.tensors()
        assert held.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-9, atol=1e-9)


lengths = st.one_of(st.integers(0, 9), st.integers(0, 70))
slot = st.integers(0, SLOTS - 1)
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(lengths, min_size=SLOTS, max_size=SLOTS), st.booleans()),
    st.tuples(st.just("take"), slot),
    st.tuples(st.just("free"), slot),
    st.tuples(st.just("fork"), slot, slot),
    st.tuples(st.just("move"), slot, slot),
    st.tuples(st.just("back"), slot, st.integers(0, 12)),
)


@every_growing
@settings(max_examples=12)
@given(program=st.lists(actions, min_size=1, max_size=12), page_size=st.sampled_from([1, 8, 16]))
def test_a_pool_is_as_good_as_values(case: str, program: list[tuple], page_size: int) -> None:
    mixer = build(case)
    pool = new_pool(mixer, 4000, page_size)
    values: dict[int, GrowingState] = {pool.take(): mixer.init_state(1) for _ in range(2)}
    for number, (action, *rest) in enumerate(program):
        if action == "step" and values:
            counts, backwards = rest
            slots = sorted(values, reverse=backwards)
            counts = counts[: len(slots)]
            if not any(counts):
                continue
            x = tokens(sum(counts), seed=number)
            with torch.no_grad():
                y, after = mixer(x, pool.view(slots), Sequences(tuple(counts)))
                for each, part, got in zip(slots, x.split(counts, 1), y.split(counts, 1), strict=True):
                    if part.shape[1]:
                        expected, values[each] = mixer(part, values[each])
                        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            assert after.tokens == tuple(values[each].tokens[0] for each in slots)
        elif action == "take" and rest[0] not in values:
            assert pool.take(rest[0]) == rest[0]
            values[rest[0]] = mixer.init_state(1)
        elif action == "free" and rest[0] in values:
            pool.free(rest[0])
            del values[rest[0]]
        elif action == "fork" and rest[0] in values and rest[1] not in values:
            before = pool.free_pages
            pool.fork(*rest)
            assert pool.free_pages == before
            values[rest[1]] = values[rest[0]]
        elif action == "move" and rest[0] in values and (rest[1] not in values or rest[1] == rest[0]):
            value = pool.evict([rest[0]])
            assert pool.restore(value, [rest[1]]) == (rest[1],)
            values[rest[1]] = values.pop(rest[0])
        elif action == "back" and rest[0] in values:
            wanted = [max(values[rest[0]].tokens[0] - rest[1], 0)]
            try:
                value = values[rest[0]].truncated(wanted)
            except UnsupportedError:
                continue
            pool.view([rest[0]]).truncated(wanted)
            values[rest[0]] = value
        same(pool, values)
    for each in values:
        pool.free(each)
    pool.check_integrity()
    assert pool.free_pages == pool.paging.pages


@every_growing
@pytest.mark.parametrize("T", [1, 3])
def test_a_batch_goes_on_in_a_pool(case: str, T: int) -> None:
    """Rows of one length, as in a value, sequences of different lengths among them."""
    mixer, pool = build(case), new_pool(build(case))
    x = torch.cat([tokens(T, seed) for seed in (1, 2, 3)])
    value = mixer.init_state(3)
    with torch.no_grad():
        _, value = mixer(tokens(70), value, Sequences((50, 7, 13)))
        slots = pool.restore(value)
        expected, after = mixer(x, value)
        got, view = mixer(x, pool.view(slots))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert view.tokens == after.tokens == (50 + T, 7 + T, 13 + T)


@pytest.mark.skipif(native.missing_reason() is not None, reason="the native kernels are not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", ["attention grouped, partial rope", "window with sinks and biases", "mla rotated"]
)
def test_native_kernels_give_the_same_in_pages(case: str, dtype: torch.dtype) -> None:
    mixer = build(case, dtype).cpu()
    value, pool = mixer.init_state(3), new_pool(mixer)
    slots = [pool.take() for _ in range(3)]
    with torch.no_grad():
        for number, counts in enumerate([(50, 1, 130), (1, 1, 1), (3, 0, 1), (8, 40, 2), (1, 1, 1)]):
            x = tokens(sum(counts), number).to("cpu", dtype)
            expected, value = mixer(x, value, Sequences(counts))
            got, _ = mixer(x, pool.view(slots), Sequences(counts))
            if memory_of(mixer).window is None:
                assert torch.equal(got, expected)
            else:  # a value has let go of keys that a page still has, and blocks of keys begin elsewhere
                torch.testing.assert_close(got, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * 4)


@every_growing
def test_a_full_pool_says_so_before_anything_is_written(case: str) -> None:
    mixer, pool = build(case), new_pool(build(case), tokens=16)
    slots = [pool.take() for _ in range(2)]
    with torch.no_grad():
        mixer(tokens(26), pool.view(slots), Sequences((20, 6)))
        view = pool.view(slots)
        kept = {name: tensor.clone() for name, tensor in view.tensors().items()}
        free = pool.free_pages
        for attempt in (
            lambda: mixer(tokens(36), view, Sequences((30, 6))),
            lambda: view.check_room((30, 6)),
            lambda: pool.restore(mixer(tokens(36), mixer.init_state(1))[1]),
        ):
            with pytest.raises(PoolError, match="the pool is full"):
                attempt()
            assert pool.free_pages == free
            pool.check_integrity()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in view.tensors().items())
        mixer(tokens(2), view, Sequences((1, 1)))
    assert pool.free_slots == (2, 3)


@every_growing
def test_forks_share_pages_until_one_writes(case: str) -> None:
    mixer, pool = build(case), new_pool(build(case), 2000)
    first = pool.take()
    with torch.no_grad():
        mixer(tokens(29), pool.view([first]))
        taken = pool.paging.pages - pool.free_pages
        second = pool.fork(first)
        assert pool.paging.pages - pool.free_pages == taken
        before = pool.view([first]).tensors()
        mixer(tokens(1), pool.view([second]))
    more = pool.paging.pages - pool.free_pages - taken
    assert more == (taken if memory_of(mixer).rewritten else 1)
    for name, tensor in pool.view([first]).tensors().items():
        assert torch.equal(tensor, before[name])


def test_a_window_gives_back_the_pages_that_left_it() -> None:
    mixer, pool = build("window"), new_pool(build("window"), 10**9)
    assert pool.paging.pages == SLOTS * (48 // 8 + 3)
    slot = pool.take()
    with torch.no_grad():
        for T in (1, 5, 8, 9, 40, 150, *[1] * 60, 7, 120):
            mixer(tokens(T), pool.view([slot]))
            assert len(pool.paging.own(slot)) <= 48 // 8 + 3
            pool.check_integrity()
    for count in (1, 8):
        with torch.no_grad():
            view = pool.view([slot])
            _, after = mixer(tokens(count), view)
        assert after.truncated(view.tokens).tokens == view.tokens
    with pytest.raises(PoolError, match="has let go"):
        pool.view([slot]).truncated([100])


@every_growing
def test_what_cannot_be_is_named(case: str) -> None:
    mixer, pool = build(case), new_pool(build(case))
    slots = [pool.take(), pool.take()]
    view = pool.view(slots)
    with torch.no_grad():
        mixer(tokens(4), view, Sequences((1, 3)))
        attempts: list[tuple[type[IntarsiaError], str, object]] = [
            (ConfigError, "gone on since", lambda: mixer(tokens(4), view, Sequences((1, 3)))),
            (ConfigError, "gone on since", view.tensors),
            (ConfigError, "fork the sequence", lambda: pool.view(slots).select([0, 0])),
            (ConfigError, "different slots", lambda: pool.view([0, 0])),
            (ConfigError, "holds no sequence", lambda: pool.view([0, 3])),
            (ConfigError, "holds no sequence", lambda: pool.free(2)),
            (ConfigError, "no slot 9", lambda: pool.view([9])),
            (ConfigError, "is taken", lambda: pool.take(1)),
            (ConfigError, "is taken", lambda: pool.fork(0, 1)),
            (ShapeError, "sequences", lambda: mixer(tokens(4), pool.view(slots))),
            (ShapeError, "has seen 1", lambda: pool.view([0]).truncated([2])),
            (ShapeError, "softmax mixer", lambda: pool.restore(build("kda").init_state(1))),
            (ShapeError, "the pool", lambda: pool.restore(build(case, torch.bfloat16).init_state(1))),
        ]
    for error, message, attempt in attempts:
        with torch.no_grad(), pytest.raises(error, match=message):
            attempt()
    pool.free(0)
    with pytest.raises(ConfigError, match="slot 0 holds no sequence"):
        pool.free(0)
    pool.check_integrity()
    for pages, page_size, count in ((0, 8, 1), (1, 0, 1), (1, 8, 0)):
        with pytest.raises(ConfigError, match="a pool needs"):
            PagedPool(memory_of(mixer), Books(count, page_size), pages, next(mixer.parameters()))


@every_growing
def test_views_come_together_in_their_pool_and_as_values(case: str) -> None:
    mixer, pool, other = build(case), new_pool(build(case)), new_pool(build(case))
    for each in (pool, other):
        slots = [each.take() for _ in range(3)]
        with torch.no_grad():
            mixer(tokens(9), each.view(slots), Sequences((1, 3, 5)))
    a, b, c = pool.view([0, 2]), pool.view([1]), other.view([2])
    assert GrowingState.concatenate([a, b]).tokens == (1, 5, 3)
    mixed = GrowingState.concatenate([a, c])
    assert mixed.tokens == (1, 5, 5)
    for name, tensor in c.tensors().items():
        assert torch.equal(mixed.select([2]).tensors()[name], tensor)


@every_growing
def test_costs_what_it_says(case: str) -> None:
    mixer = build(case, torch.bfloat16)
    pool = mixer.new_pool(2)
    cost = mixer.cost()
    assert pool.nbytes == cost.pool_bytes([1, 1], page_size=16)
