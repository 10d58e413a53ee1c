"""Whether a server's response headers say that a picture must not be collected.

Read: `X-Robots-Tag` (per crawler or for all), `tdm-reservation` (TDM Reservation Protocol) and
`Content-Usage: train-ai=n` (IETF aipref draft).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

REFUSALS = frozenset({"noai", "noimageai", "noml", "none", "noindex", "noimageindex"})
"""The `X-Robots-Tag` directives that are honoured."""

# Directives that carry a value after a colon; any other token before a colon names a crawler. What
# is no token stands in the middle of a value, as the hour of a date does.
_WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
_AGENT = re.compile(r"\*|[a-z][\w.-]*")


def opts_out(headers: Iterable[tuple[str, str]], agent: str) -> bool:
    """Whether any header refuses a crawler whose product token is `agent`.

    `headers` are (lower-case name, value) in the order in which they came; a name may repeat.
    """
    for name, value in headers:
        if name == "x-robots-tag":
            if _robots_refuse(value.lower(), agent.lower()):
                return True
        elif name == "tdm-reservation":
            if value.strip() == "1":
                return True
        elif name == "content-usage" and any(
            preference.replace(" ", "").partition(";")[0] == "train-ai=n"
            for preference in value.lower().split(",")
        ):
            return True
    return False


def _robots_refuse(value: str, agent: str) -> bool:
    """One `X-Robots-Tag` value: a crawler named before a colon owns what follows it."""
    addressed = True
    for part in value.split(","):
        name, colon, rest = part.partition(":")
        directive = part.strip()
        name = name.strip()
        if colon and _AGENT.fullmatch(name) and name not in _WITH_VALUE:
            addressed = name in ("*", agent)
            directive = rest.strip()
        if addressed and directive in REFUSALS:
            return True
    return False


def product_token(user_agent: str) -> str:
    """The name by which a server addresses this crawler: `openwit` for `openwit/1.0 (+…)`."""
    words: Sequence[str] = user_agent.replace("/", " ").split()
    return words[0].lower() if words else ""
