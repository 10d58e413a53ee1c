"""Pictures of the selected pairs: fetched within bounds, resized by img2dataset, staged in tars.

A task owns a range of uids, so what it stages is contiguous in the order in which `pack` reads it.
What was fetched once is not fetched again: after another cap, or with another snapshot, a task
takes over what earlier ones of the run fetched with the same settings, and asks for the rest.
The work is in `shard.py`; this module is what every command imports, so it stays light.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime, timezone
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from dataset_build import dedup, functions, lists, records, uid_range
from pipeline.config import ConfigError, Settings
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stats import Stats

NO_CONTACT = (
    "download.contact is not set: servers are told who fetches from them, so give a page or a mail"
    " address at which their owners reach you, e.g. download.contact=https://lab.example/crawl"
)

Format = Literal["jpeg", "png", "webp", "gif"]


class DomainLimits(Settings):
    """How hard one registered domain may be asked."""

    connections: int = Field(2, gt=0, le=1024)
    """Connections in use at the same time."""
    requests_per_s: float | None = Field(1.0, gt=0)
    """Requests begun a second; null for any number."""


class DownloadSettings(Settings):
    """How pictures are fetched and resized."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"threads", "contact", "polite_connections", "requests_per_s", "domain_limits"}
    ) | {"limits_span", "max_wait_s", "max_crawl_delay_s", "refuse_networks"}

    pairs_per_task: int = Field(10_000, gt=0)
    """Pairs that one task fetches, on average."""
    threads: int = Field(32, gt=0, le=1024)
    """Addresses that a task fetches at the same time."""
    polite_connections: int = Field(2, gt=0, le=1024)
    """Connections to one registered domain in use at the same time, by all tasks of the run
    together."""
    requests_per_s: float | None = Field(1.0, gt=0)
    """Requests begun a second at one registered domain, by all tasks together; null for any number.
    One is what a small site on a shared host bears without anybody noticing; 86,400 pictures a day
    of one domain are also as many as a dataset should have of it."""
    domain_limits: dict[str, DomainLimits] = Field(default_factory=dict)
    """Other limits for registered domains that are made for more, such as large content delivery
    networks: `{cdn.example: {connections: 32, requests_per_s: 50}}`."""
    limits_span: Literal["run", "task"] = "run"
    """Who keeps to the limits together: all tasks of the run, through locks in RUN/download/turns,
    or each task for itself, where the file system has no locks."""
    max_wait_s: float = Field(120.0, ge=0)
    """Seconds that a task waits, in all, for a domain that asks to be left alone (Retry-After). If
    it takes longer, the domain's other addresses are given up: nobody is asked against his wish."""
    max_crawl_delay_s: float = Field(30.0, ge=0)
    """A longer Crawl-delay in a robots.txt counts as this, seconds."""
    contact: str = ""
    """Address of a page, or of mail, at which a site's owner reaches you; sent to every server. A
    build that would ask servers of others does not begin without it."""
    user_agent: str = Field("openwit/0.1", pattern=r"^[!-~]+/[\x20-\x7e]+$")
    """Who asks: `name/version`. Servers address their opt-outs to the name."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds that one address may take in all: look-up, redirects, retries and body."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds until a connection must stand, with its encryption."""
    slow_bytes_per_s: int = Field(200, ge=1)
    """A transfer slower than this for `slow_s` seconds is given up."""
    slow_s: int = Field(10, ge=1)
    """See `slow_bytes_per_s`."""
    retries: int = Field(1, ge=0, le=10)
    """Further tries after an error that may pass: lost connections, 429, 5xx."""
    max_redirects: int = Field(5, ge=0, le=20)
    """Redirects followed; each new address is checked like the first."""
    allow_networks: tuple[str, ...] = ()
    """Networks outside the public internet that `OPENWIT_CONNECT_TO` may lead into, as
    `127.0.0.0/8`: how the sample web is reached. Addresses that come from data never get there.
    What was refused for want of an entry here is asked again once there is one."""
    refuse_networks: tuple[str, ...] = ()
    """Networks of the public internet that are not connected to either, as `203.0.113.0/24`: your
    own, where what trusts its neighbours has a public address."""
    max_bytes: int = Field(20 << 20, gt=0)
    """Largest file accepted, bytes."""
    max_pixels: int = Field(25_000_000, gt=0)
    """Largest picture decoded, pixels; a bomb is refused by its header."""
    min_side: int = Field(16, ge=1)
    """Smallest side accepted, pixels."""
    max_aspect_ratio: float = Field(20.0, ge=1)
    """Largest ratio of the sides accepted."""
    formats: tuple[Format, ...] = ("jpeg", "png", "webp")
    """What may reach a decoder, told by the first bytes. Of a `gif` the first frame is taken."""
    robots: Literal["respect", "ignore"] = "respect"
    """Whether robots.txt is asked for, once a day and host, and kept to (RFC 9309): what is
    disallowed is not asked for, nor anything of a host whose robots.txt fails with 429 or 5xx."""
    honour_opt_out: bool = True
    """Drop what X-Robots-Tag, tdm-reservation or Content-Usage reserve."""
    image_size: int = Field(256, gt=0)
    """Side of the stored picture, pixels; which side, `resize_mode` says. 256 leaves crops of 224 a
    margin; to train at 336, store 336. docs/download.md has what each size costs."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = (
        "keep_ratio"
    )
    """As in img2dataset. `keep_ratio` brings the shorter side to `image_size` and cuts nothing off;
    `center_crop` also cuts the longer one, `keep_ratio_largest` brings the longer to that size,
    `border` also fills up with white, `no` leaves the size."""
    resize_only_if_bigger: bool = True
    """Never enlarge."""
    encode_quality: int = Field(90, ge=1, le=100)
    """Quality of the stored JPEG. 95 takes 43 % more bytes; see docs/download.md."""
    blur: str = ""
    """What shall not be recognised, such as faces: `package.module:function`, importable from the
    folder that the build is started in. It takes a picture (uint8 [height, width, 3], RGB, as the
    server sent it) and returns boxes, [left, top, right, bottom] each, as shares of its width and
    height; what is in them is blurred before it is stored. `dataset_build.faces:boxes` is one. Load
    a model when the module is imported: once pictures are fetched, nothing may be unpickled, no
    program started and no file written outside the run."""
    ask_again_before: datetime | None = None
    """What failed before this moment, and may have passed by now, is asked for once more: a date
    (UTC), or a time as `2026-11-29T18:00:00Z`. By default nothing is ever asked for twice."""
    expected: tuple[str, ...] = ()
    """Tables of a published dataset, its `index.parquet` or `fetched-*.parquet`: of the addresses
    in them only the very files that they list are accepted, by SHA-256. By default any file is."""

    @field_validator("contact")
    @classmethod
    def _reaches_someone(cls, contact: str) -> str:
        if not re.fullmatch(r"(https?://[!-~]+|(mailto:)?[!-~]+@[!-~]+\.[!-~]+)?", contact):
            raise ValueError("neither the address of a page (https://…) nor one of mail (me@…)")
        return contact

    @field_validator("blur")
    @classmethod
    def _is_function(cls, name: str) -> str:
        if not re.fullmatch(r"([\w.]+:\w+)?", name):
            raise ValueError("not of the form package.module:function")
        return name

    @field_validator("domain_limits")
    @classmethod
    def _are_registered(cls, limits: dict[str, DomainLimits]) -> dict[str, DomainLimits]:
        from dataset_build.domains import registered  # which needs this package

        for name in limits:
            if name != (domain := registered(name.lower())):
                raise ValueError(
                    f"{name}: not a registered domain; the limits are those of {domain}"
                )
        return limits

    @field_validator("allow_networks", "refuse_networks")
    @classmethod
    def _are_networks(cls, blocks: tuple[str, ...]) -> tuple[str, ...]:
        for block in blocks:
            ipaddress.ip_network(block)  # a ValueError says what is wrong with it
        return blocks

    @field_validator("ask_again_before")
    @classmethod
    def _is_utc(cls, moment: datetime | None) -> datetime | None:
        return moment.replace(tzinfo=timezone.utc) if moment and moment.tzinfo is None else moment

    def asks_again(self, status: str, fetched: float) -> bool:
        """Whether an earlier outcome is void, that of the Unix time `fetched`."""
        before = self.ask_again_before
        return before is not None and status in MAY_PASS and fetched < before.timestamp()

    def limits_of(self, domain: str) -> DomainLimits:
        """The limits of a registered domain."""
        usual = DomainLimits(
            connections=self.polite_connections, requests_per_s=self.requests_per_s
        )
        return self.domain_limits.get(domain, usual)

    @property
    def agent(self) -> str:
        """The User-Agent header."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent


REASONS: dict[str, str] = {
    "malformed_url": "the address cannot be read, or carries credentials",
    "blocked_scheme": "neither http nor https",
    "blocked_port": "a port below 1024 other than 80 and 443",
    "blocked_address": "the host is not on the public internet",
    "blocked": "the address or its domain is on a list of lists.blocked",
    "opted_out": "the address or its domain is on a list of lists.opted_out",
    "robots": "its robots.txt disallows it, or cannot be read now",
    "held_off": "its domain asked to be left alone for longer than max_wait_s",
    "dns": "the host's name does not resolve",
    "connect": "no connection",
    "tls": "encryption failed, or the certificate is not valid",
    "connection_lost": "the server broke off before it answered",
    "bad_response": "the answer is not HTTP",
    "timeout": "not done in time, or too slow",
    "too_many_redirects": "more redirects than allowed, or one without a target",
    "dead_link": "404 or 410",
    "forbidden": "401, 402, 403 or 451",
    "too_many_requests": "429",
    "client_error": "another 4xx",
    "server_error": "5xx",
    "unexpected_status": "an answer that is neither a picture, a redirect nor an error",
    "opt_out": "the server reserves the picture",
    "too_large": "more than max_bytes",
    "changed": "the file is not the one that `expected` lists",
    "not_an_image": "none of the accepted formats",
    "truncated": "the file stops before its end",
    "too_many_pixels": "more than max_pixels",
    "too_small": "a side below min_side",
    "too_long": "sides beyond max_aspect_ratio",
    "undecodable": "the decoder refuses it",
    "removed": "somebody has asked for it to be removed, see RUN/removed",
    "fetch_failed": "anything else",
}
"""Why a pair has no picture: the `status` of `fetched-*.parquet` and the report's drop reasons."""

MAY_PASS = frozenset(
    {
        *("robots", "held_off", "dns", "connect", "tls", "connection_lost", "bad_response"),
        *("timeout", "too_many_redirects", "forbidden", "too_many_requests", "client_error"),
        *("server_error", "unexpected_status", "truncated", "fetch_failed"),
    }
)
"""The reasons among them that another day may not have. See `ask_again_before`."""

LISTED = frozenset({"blocked", "opted_out"})
"""The reasons among them that lists give, of `ListsSettings`."""


def plan(run: Run) -> list[Task]:
    """Cut the selected pairs into equal ranges of uids; a uid is a hash, so ranges are equal."""
    selected = run.find("balance:selected-*.parquet")
    names = {reference.partition(":")[2] for reference in selected}
    outputs = (output for manifest in run.manifests("balance") for output in manifest.outputs)
    rows = sum(output.rows or 0 for output in outputs if output.name in names)
    settings: DownloadSettings = run.settings("download")
    moment = settings.ask_again_before
    if moment and moment > datetime.now(timezone.utc):
        raise ConfigError(f"download.ask_again_before: {moment} is yet to come")
    for reference in expected(run):
        records.sent_digest(run.path(reference))  # says so now if it does not know
    parts = max(1, -(-rows // settings.pairs_per_task))
    identity = functions.identity("download.blur", settings.blur) if settings.blur else ""
    blurring = {"blur": identity} if identity else {}
    tasks = []
    for part in range(parts):
        groups = dedup.within(run, *uid_range.bounds(part, parts))
        reads = [selected[group] for group in groups]
        for group in groups:
            reads += run.find(f"dedup:texts-*-{group:05d}.parquet")
        reads += expected(run)
        params = {"part": part, "parts": parts, "groups": len(groups), **blurring}
        tasks.append(Task("download", part, tuple(reads), params))
    return lists.reading(run, tasks, "addresses", "domains")


def expected(run: Run) -> list[str]:
    """The files that `download.expected` names. Raises `MissingInput` where there is none."""
    settings: DownloadSettings = run.settings("download")
    return [reference for pattern in settings.expected for reference in run.find(pattern)]


def work(attempt: Attempt) -> Stats:
    """Fetch, resize and stage what of one range of uids no earlier download has."""
    from dataset_build.download.shard import fetch_shard

    return fetch_shard(attempt)


STAGE = Stage(
    "download", ("dedup", "balance"), plan, work, unit="pairs", version=6, can_lose_tasks=True
)
