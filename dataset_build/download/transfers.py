"""All of a task's transfers, run by libcurl in one thread for the threads that wait for them.

Handles that each run for themselves would each read the authorities' certificates (some 150 of
them) and keep connections and TLS sessions of their own; here they are held once for all.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pycurl

_LOOK_S = 0.2  # how often it is asked whether to stop
KEPT = 256
"""Connections that stay open, at most, for the next request."""
_ACTIONS = (
    (select.EPOLLIN | select.EPOLLHUP, pycurl.CSELECT_IN),
    (select.EPOLLOUT, pycurl.CSELECT_OUT),
    (select.EPOLLERR, pycurl.CSELECT_ERR),
)


@dataclass
class _Transfer:
    curl: pycurl.Curl
    error: int = pycurl.E_ABORTED_BY_CALLBACK
    ended: threading.Lock = field(default_factory=threading.Lock)
    """Held until the transfer is over."""


class Transfers:
    """Runs transfers until it is closed; when `stopping` says so, they end with
    `E_ABORTED_BY_CALLBACK`."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._added: deque[_Transfer] = deque()
        self._running: dict[pycurl.Curl, _Transfer] = {}
        self._due: float | None = None
        self._is_closed = False
        self._failure: BaseException | None = None
        self._epoll = select.epoll()
        self._watched: set[int] = set()
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._doorbell, select.EPOLLIN)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, KEPT)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._thread = threading.Thread(target=self._run, name="transfers", daemon=True)
        self._thread.start()

    def perform(self, curl: pycurl.Curl) -> int:
        """Run one transfer to its end; libcurl's error code, 0 for none."""
        transfer = _Transfer(curl)
        transfer.ended.acquire()  # free, since nobody else knows of it
        self._added.append(transfer)
        os.eventfd_write(self._doorbell, 1)
        while not transfer.ended.acquire(timeout=_LOOK_S):  # it may have come too late to be seen
            if not self._thread.is_alive():
                break
        if self._failure is not None:
            raise RuntimeError("transfers have failed") from self._failure
        return transfer.error

    def close(self) -> None:
        """End the thread and close every connection; raises what the thread failed with."""
        self._is_closed = True
        os.eventfd_write(self._doorbell, 1)
        self._thread.join()
        self._multi.close()
        self._epoll.close()
        os.close(self._doorbell)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._turn()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._abort()

    def _turn(self) -> None:
        wait_s = _LOOK_S
        if self._due is not None:
            wait_s = min(wait_s, max(0.0, self._due - time.monotonic()))
        for file, events in self._epoll.poll(wait_s):
            if file == self._doorbell:
                os.eventfd_read(file)
            elif file in self._watched:  # it may have gone since the poll
                action = sum(code for mask, code in _ACTIONS if events & mask)
                self._multi.socket_action(file, action)
        if self._stopping():
            self._abort()
        while self._added:
            transfer = self._added.popleft()
            self._running[transfer.curl] = transfer
            self._multi.add_handle(transfer.curl)
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._settle()

    def _settle(self) -> None:
        """Give the threads back the transfers that have ended."""
        left = 1
        while left:
            left, good, bad = self._multi.info_read()
            for curl in good:
                self._end(curl, 0)
            for curl, error, _ in bad:
                self._end(curl, error)

    def _end(self, curl: pycurl.Curl, error: int) -> None:
        self._multi.remove_handle(curl)
        transfer = self._running.pop(curl)
        transfer.error = error
        transfer.ended.release()

    def _abort(self) -> None:
        for curl in list(self._running):
            self._end(curl, pycurl.E_ABORTED_BY_CALLBACK)
        while self._added:
            self._added.popleft().ended.release()

    def _watch(self, what: int, file: int, multi: object, data: object) -> None:
        """libcurl's word on which socket it waits for, and for what."""
        if what == pycurl.POLL_REMOVE:
            self._watched.discard(file)
            self._epoll.unregister(file)
            return
        events = 0
        if what in (pycurl.POLL_IN, pycurl.POLL_INOUT):
            events |= select.EPOLLIN
        if what in (pycurl.POLL_OUT, pycurl.POLL_INOUT):
            events |= select.EPOLLOUT
        if file in self._watched:
            self._epoll.modify(file, events)
        else:
            self._watched.add(file)
            self._epoll.register(file, events)

    def _set_timer(self, wait_ms: int) -> None:
        """libcurl's word on when it wants to be asked again at the latest."""
        self._due = None if wait_ms < 0 else time.monotonic() + wait_ms / 1000
