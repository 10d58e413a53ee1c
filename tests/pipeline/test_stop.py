from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pipeline.stop import DUMP, SIGNALS, StopFlag, Stopped, shielded


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


_PARENT = """
import subprocess, sys, time
from pipeline.stop import StopFlag, shielded
stop = StopFlag().install()
with shielded():
    kept = subprocess.Popen(["sleep", "60"])
    told = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(kept.pid, flush=True)
while not stop:
    time.sleep(0.01)
print(told.communicate()[0].strip(), kept.poll(), flush=True)
kept.kill()
kept.wait()
"""
_CHILD = """
import signal, time
from pipeline.stop import StopFlag
while not signal.sigpending():  # it comes before there is a handler
    time.sleep(0.01)
stop = StopFlag().install()
print(signal.Signals(stop.signal).name)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_ends_none_that_was_started_shielded(
    number: signal.Signals,
) -> None:
    command = [sys.executable, "-c", _PARENT, _CHILD]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        kept = int(parent.stdout.readline())
        os.killpg(parent.pid, number)
        os.kill(kept, DUMP)
        assert parent.stdout.read().split() == [number.name, "None"]
    assert parent.returncode == 0


def test_the_shield_is_lifted_with_what_came_meanwhile(flag: StopFlag) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with shielded():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert flag.signal == signal.SIGUSR2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
