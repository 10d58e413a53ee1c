"""Whether there is a network at all: that nobody answers is believed once somebody else does.

A machine without a network, or without a name server, finds that no address can be reached. Such
outcomes wait until any server has answered; if none does, the task fails and nobody is condemned.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from dataset_build.domains import registered
from pipeline.config import UserError

Ended = tuple[bytes, dict[str, Any], bytes | None]
"""An address, its outcome and its picture."""

_SILENT = frozenset({"dns", "connect", "connection_lost", "timeout"})
_ANSWERS = frozenset({"tls", "bad_response"})
# Those in flight when an earlier attempt, or the last answer, ended are the slowest, so all of them
# may be dead. Of so many others, and no more than a few of a domain, which may be dead as well, it
# cannot be: where 6 of 10 addresses are, once in 4 million tasks.
_ADDRESSES, _OF_A_DOMAIN = 30, 10
_SURELY = 10  # times as many, and nobody need wait for the task's end


class NoNetwork(UserError):
    """Nobody answers this machine."""


class Silence:
    """Holds back outcomes that say nobody answered; `threads` addresses are asked at a time."""

    def __init__(self, threads: int) -> None:
        self._most = _ADDRESSES + threads
        self._held: list[Ended] = []

    def after(self, ended: Ended) -> list[Ended]:
        """What can be believed now that this address has ended. Raises `NoNetwork`."""
        _, outcome, _ = ended
        answered = outcome["http_status"] or outcome["received"] or outcome["status"] in _ANSWERS
        if outcome["status"] in _SILENT and not answered:
            self._held.append(ended)
            if len(self._held) % (_SURELY * self._most) == 0:
                self._check()
            return []
        return [*(self._taken() if answered else ()), ended]

    def rest(self) -> list[Ended]:
        """What is left at the end. Raises `NoNetwork` if it is too much to be believed."""
        self._check()
        return self._taken()

    def _check(self) -> None:
        hosts = (urlsplit(outcome["url"]).hostname or "" for _, outcome, _ in self._held)
        domains = Counter(map(registered, hosts))
        if sum(min(count, _OF_A_DOMAIN) for count in domains.values()) >= self._most:
            why = ", ".join(sorted({outcome["status"] for _, outcome, _ in self._held}))
            raise NoNetwork(
                f"of the last {len(self._held)} addresses, of {len(domains)} domains, none answered"
                f" ({why}): this machine has no network, or no name server. Put that right and run"
                " the same command again: they will be asked then"
            )

    def _taken(self) -> list[Ended]:
        held, self._held = self._held, []
        return held
