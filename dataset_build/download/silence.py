"""Whether there is a network at all: that nobody answers is believed once somebody else does.

A machine without a network, or without a name server, finds that no address can be reached. Such
outcomes wait until any server has answered; if none does, the task fails and nobody is condemned.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from dataset_build.domains import registered
from pipeline.config import UserError

Ended = tuple[bytes, dict[str, Any], bytes | None]
"""An address, its outcome and its picture."""

_SILENT = frozenset({"dns", "connect", "connection_lost", "timeout"})
_ANSWERS = frozenset({"tls", "bad_response"})
# Those in flight when an earlier attempt, or the last answer, ended are the slowest, so all of them
# may be dead; of these many others, of some domains, not all are.
_ADDRESSES, _DOMAINS = 20, 5


class NoNetwork(UserError):
    """Nobody answers this machine."""


class Silence:
    """Holds back outcomes that say nobody answered; `threads` addresses are asked at a time."""

    def __init__(self, threads: int) -> None:
        self._most = _ADDRESSES + threads
        self._held: list[Ended] = []

    def after(self, ended: Ended) -> list[Ended]:
        """What can be believed now that this address has ended."""
        _, outcome, _ = ended
        answered = outcome["http_status"] or outcome["received"] or outcome["status"] in _ANSWERS
        if outcome["status"] in _SILENT and not answered:
            self._held.append(ended)
            return []
        return [*(self._taken() if answered else ()), ended]

    def rest(self) -> list[Ended]:
        """What is left at the end. Raises `NoNetwork` if it is too much to be believed."""
        hosts = {urlsplit(outcome["url"]).hostname or "" for _, outcome, _ in self._held}
        domains = set(map(registered, hosts))
        if len(self._held) >= self._most and len(domains) >= _DOMAINS:
            why = ", ".join(sorted({outcome["status"] for _, outcome, _ in self._held}))
            raise NoNetwork(
                f"of the last {len(self._held)} addresses, of {len(domains)} domains, none answered"
                f" ({why}): this machine has no network, or no name server. Put that right and run"
                " the same command again: they will be asked then, and only they"
            )
        return self._taken()

    def _taken(self) -> list[Ended]:
        held, self._held = self._held, []
        return held
