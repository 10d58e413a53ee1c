"""Whether a server's response headers say that a picture must not be collected.

Read: `X-Robots-Tag` (for one crawler or for all), `tdm-reservation` (TDM Reservation Protocol) and
`Content-Usage: train-ai=n` (IETF aipref-attach draft). What cannot be understood of a date after
which a picture is to be gone counts as a refusal: its owner wants a limit that we cannot keep.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone

REFUSALS = frozenset({"noai", "noimageai", "noml", "none", "noindex", "noimageindex"})
"""The `X-Robots-Tag` directives that are honoured, besides `unavailable_after` a date gone by."""

# Directives that carry a value after a colon; any other token before a colon names a crawler. What
# is no token stands in the middle of a value, as the hour of a date does.
_WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
_AGENT = re.compile(r"\*|[a-z][\w.-]*")
_WEEKDAY = re.compile(r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?")
_DATES = ("%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%d %B %Y", "%Y/%m/%d")


def opts_out(headers: Iterable[tuple[str, str]], agent: str) -> bool:
    """Whether any header refuses a crawler whose product token is `agent`.

    `headers` are (lower-case name, value) in the order in which they came; a name may repeat.
    """
    for name, value in headers:
        if name == "x-robots-tag":
            if _robots_refuse(value.lower(), agent.lower()):
                return True
        elif name == "tdm-reservation":
            if "1" in (item.strip() for item in value.split(",")):
                return True
        elif name == "content-usage" and usage_refused(value):
            return True
    return False


def usage_refused(preferences: str) -> bool:
    """Whether `train-ai=n` is among some usage preferences, as in `search=y, train-ai=n`."""
    items = (item.partition(";")[0].replace(" ", "") for item in preferences.lower().split(","))
    return "train-ai=n" in items


def product_token(user_agent: str) -> str:
    """The name by which a server addresses this crawler: `openwit` for `openwit/1.0 (+…)`."""
    words: Sequence[str] = user_agent.replace("/", " ").split()
    return words[0].lower() if words else ""


def _robots_refuse(value: str, agent: str) -> bool:
    """One `X-Robots-Tag` value: a crawler named before a colon owns what follows it."""
    addressed = True
    for part in _parts(value):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        directive = part
        if colon and _AGENT.fullmatch(name) and name not in _WITH_VALUE:
            addressed = name in ("*", agent)
            directive = rest
            name, _, rest = (piece.strip() for piece in rest.partition(":"))
        if not addressed:
            continue
        if directive in REFUSALS or (name == "unavailable_after" and not _to_come(rest)):
            return True
    return False


def _parts(value: str) -> Iterator[str]:
    """What stands between commas; a weekday and the date after its comma stay together."""
    held = ""
    for part in value.split(","):
        part = held + part.strip()
        held = ""
        if _WEEKDAY.fullmatch(part.rpartition(":")[2].strip()) and "unavailable_after" in part:
            held = f"{part} "
        else:
            yield part
    if held:
        yield held.strip()


def _to_come(text: str) -> bool:
    """Whether a date (RFC 822, RFC 850, ISO 8601; in lower case, its comma gone) is to come."""
    words = text.split()
    if words and _WEEKDAY.fullmatch(words[0]):
        words = words[1:]
    text = " ".join(words)
    moment: datetime | None = None
    try:
        moment = datetime.fromisoformat(re.sub(r"z$", "+00:00", text))
    except ValueError:
        for form in _DATES:
            try:
                moment = datetime.strptime(text, form)
                break
            except ValueError:
                continue
    if moment is None:
        try:
            moment = email.utils.parsedate_to_datetime(text)
        except (TypeError, ValueError, IndexError, OverflowError):
            return False
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp() > time.time()
