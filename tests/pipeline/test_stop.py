from __future__ import annotations

import os
import signal

import pytest

from pipeline.stop import SIGNALS, StopFlag, Stopped


@pytest.fixture
def flag() -> object:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopFlag().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_raises_the_flag(flag: StopFlag, number: signal.Signals) -> None:
    flag.check()
    assert flag.name == "a signal to another process"
    os.kill(os.getpid(), number)
    assert flag
    assert flag.name == number.name
    with pytest.raises(Stopped, match=number.name):
        flag.check()


def test_a_forked_child_ignores_the_signal(flag: StopFlag) -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1 if flag else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_second_interrupt_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        StopFlag().install()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
