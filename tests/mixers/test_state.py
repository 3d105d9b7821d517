"""States are values: between calls, between threads, and between the modes of autograd."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.layers.growing import GrowingTensor
from intarsia.layers.states import State
from intarsia.mixers import AttentionConfig, ForgettingConfig, MLAConfig, SlidingWindowConfig
from intarsia.ops import Sequences

every_limit = pytest.mark.parametrize("limit", [None, 6, 40])
THREADS = 4


@pytest.fixture
def hurried_threads() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)`, `work(1)`, … give, begun at the same moment."""
    results: list[Any] = [None] * THREADS
    begin = threading.Barrier(THREADS)

    def run(number: int) -> None:
        begin.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _WithSomebodyBetween(Tensor):
    """Entries during whose copying somebody else comes."""

    somebody: Callable[[], None] | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and (somebody := cls.somebody) is not None:
            cls.somebody = None
            somebody()
        return super().__torch_function__(func, types, args, kwargs or {})


@every_limit
def test_somebody_who_appends_meanwhile_gets_room_of_his_own(limit: int | None) -> None:
    start = GrowingTensor(torch.zeros(1, 3, 2), limit).append(torch.zeros(1, 1, 2))
    others: list[GrowingTensor] = []
    _WithSomebodyBetween.somebody = lambda: others.append(start.append(2 * torch.ones(1, 2, 2)))
    mine = start.append(torch.ones(1, 2, 2).as_subclass(_WithSomebodyBetween))
    assert len(others) == 1
    assert mine.content[0, -2:, 0].tolist() == [1, 1]
    assert others[0].content[0, -2:, 0].tolist() == [2, 2]
    assert start.content[0, :, 0].tolist() == [0, 0, 0, 0]


@every_limit
def test_threads_that_go_on_from_one_sequence_do_not_meet(limit: int | None, hurried_threads: None) -> None:
    for _ in range(100):
        start = GrowingTensor(torch.zeros(1, 4, 64), limit).append(torch.zeros(1, 1, 64))

        def go_on(number: int, start: GrowingTensor = start) -> GrowingTensor:
            first = start.append(torch.full((1, 16, 64), number + 1.0))
            return first.append(torch.full((1, 1, 64), number + 11.0))

        for number, end in enumerate(in_threads(go_on)):
            kept = end.content[0, -17:]
            assert (kept[:-1] == number + 1).all()
            assert (kept[-1] == number + 11).all()
        assert not start.content.any()


CONFIGS = {
    "key-value": AttentionConfig(2, 4),
    "window": SlidingWindowConfig(2, 4, window=5),
    "latent": MLAConfig(2, 6, 4, 2, 4),
    "growing": ForgettingConfig(2, 4, kv_shift=True),
}


def state_of(kind: str) -> State:
    """After two tokens and seven."""
    mixer = CONFIGS[kind].build(8)
    with torch.no_grad():
        _, state = mixer(torch.ones(1, 9, 8), mixer.init_state(2), Sequences((2, 7)))
    assert state is not None
    assert state.kind == kind
    return state


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))]
)
def test_states_can_be_copied_and_sent(kind: str, duplicate: Callable[[State], State]) -> None:
    state = state_of(kind)
    again = duplicate(state)
    assert again.tokens == state.tokens
    for mine, other in zip(state.tensors().values(), again.tensors().values(), strict=True):
        assert torch.equal(mine, other)


@every_limit
def test_what_inference_mode_made_goes_on_outside_and_back(limit: int | None) -> None:
    def entry(value: float) -> Tensor:
        return torch.full((1, 1, 2), float(value))

    with torch.inference_mode():
        held = GrowingTensor(torch.zeros(1, 0, 2), limit).append(entry(1)).append(entry(2))
    with torch.no_grad():
        outside = held.append(entry(3))
        further = outside.append(entry(4))
    assert further.content.data_ptr() == outside.content.data_ptr(), "copied once"
    assert not further.content.is_inference()
    with torch.inference_mode():
        fork, back = held.append(entry(5)), further.append(entry(6))
    assert held.content[0, :, 0].tolist() == [1, 2]
    assert outside.content[0, :, 0].tolist() == [1, 2, 3]
    assert fork.content[0, :, 0].tolist() == [1, 2, 5]
    assert back.content[0, :, 0].tolist() == [1, 2, 3, 4, 6]
    with torch.enable_grad():
        trained = fork.append(entry(7).requires_grad_()).content
    assert trained.requires_grad
    trained.sum().backward()
