"""How many threads share work while other programs want the cores: the rule, on a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from intarsia.ops import native

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")

MS = 1_000_000
PAUSE, LAST = 5 * MS, 200 * MS
"""As in csrc/crowd.h."""


@pytest.fixture
def crowd() -> Any:
    return native.native().Crowd()


def held_up(crowd: Any, threads: int, now: int) -> int:
    """A call in which a thread waited for 3 ms to do 0.1 ms of work, and when it was over."""
    end = now + 3 * MS
    crowd.saw(threads, now, end, MS // 10)
    return end


def test_all_work_while_nobody_is_held_up(crowd: Any) -> None:
    crowd.saw(8, 0, MS, MS)
    crowd.saw(8, 0, MS, MS * 6 // 10)  # what waking it takes
    crowd.saw(8, 0, 100 * MS, 60 * MS)  # away for long, but not for most of the time
    assert crowd.allowed(8, 0) == 8


def test_half_as_many_until_the_pause_is_over(crowd: Any) -> None:
    end = held_up(crowd, 8, 0)
    assert crowd.allowed(8, end) == 4
    assert crowd.allowed(3, end) == 3
    assert crowd.allowed(8, end + PAUSE - 1) == 4
    assert crowd.allowed(8, end + PAUSE) == 8
    assert crowd.allowed(8, end + PAUSE) == 8


def test_down_to_one_and_step_by_step_up_again(crowd: Any) -> None:
    now = 0
    for threads in (8, 4, 2):
        assert crowd.allowed(8, now) == threads
        now = held_up(crowd, threads, now)
    assert crowd.allowed(8, now) == 1
    found = []
    for _ in range(4):
        now += LAST
        found.append(crowd.allowed(8, now))
    assert found == [2, 4, 8, 8]


def test_tries_in_vain_become_rare(crowd: Any) -> None:
    now, pauses = held_up(crowd, 2, 0), []
    for _ in range(8):
        begin = now
        while crowd.allowed(2, now) == 1:
            now += MS
        pauses.append((now - begin) // MS)
        now = held_up(crowd, 2, now)
    assert pauses == [5, 10, 20, 40, 80, 160, 200, 200]
    # And not for ever: what happens much later is another matter.
    crowd.allowed(2, now + LAST)
    now = held_up(crowd, 2, now + 10 * LAST)
    assert crowd.allowed(2, now + PAUSE) == 2


def test_calls_that_began_before_count_once(crowd: Any) -> None:
    end = held_up(crowd, 8, 0)
    crowd.saw(8, 0, end, 0)
    crowd.saw(8, 0, end, 0)
    assert crowd.allowed(8, end) == 4
