"""What stops a process: a request that is seen between two steps, or an interruption."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from intarsia.jobs.signals import StopRequest, terminable


def handlers() -> tuple[object, ...]:
    return tuple(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_is_noted_and_told_once(number: signal.Signals) -> None:
    before, told = handlers(), []
    with StopRequest(told.append) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(told) == 1
    assert handlers() == before


def test_the_second_ctrl_c_interrupts() -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopRequest(lambda text: None):
        [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert handlers() == before


def test_sigterm_interrupts_as_ctrl_c_does() -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers() == before


def test_outside_the_main_thread_nothing_changes() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with terminable(), StopRequest(lambda text: None) as stop:
            seen.append((stop.requested, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
