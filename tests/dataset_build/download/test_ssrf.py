"""Nothing but the public internet is ever connected to: canary servers on loopback count."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pycurl
import pytest

from dataset_build.addresses import is_public
from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Connection, Detour
from dataset_build.download.transport import Refused, Transport, checked
from tests.dataset_build.download.conftest import HostileWeb
from tests.dataset_build.download.vectors import (
    CONFUSIONS,
    DECOY,
    LOOPBACK_HOSTS,
    PRIVATE_HOSTS,
    SCHEMES,
)

CANARIES = ("127.0.0.1", "127.0.0.2", "127.255.255.254", "::1")
# What a vector may end in: refused, no such name, or asked of the harmless host in it.
HARMLESS = {"blocked_address", "blocked_scheme", "blocked_port", "malformed_url", "dns"}
HARMLESS |= {"dead_link", "too_many_redirects", "bad_response"}


@pytest.fixture
def canaries() -> Iterator[list[HostileWeb]]:
    """Private services on several loopback addresses, all at one port."""
    while True:
        servers = [HostileWeb(CANARIES[0])]
        try:
            servers += [HostileWeb(host, servers[0].port) for host in CANARIES[1:]]
        except OSError:  # the port is taken on one of them
            servers[0].close()
            continue
        break
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def vectors(canaries: list[HostileWeb], tmp_path: Path) -> list[str]:
    port = canaries[0].port
    decoy = tmp_path / "decoy.txt"
    decoy.write_text(DECOY)
    found = [f"http://{host}:{port}/ok.jpg" for host in PRIVATE_HOSTS]
    return found + [form.format(port=port, decoy=decoy) for form in (*CONFUSIONS, *SCHEMES)]


@contextmanager
def transport(web: HostileWeb | None, **settings: Any) -> Iterator[Transport]:
    settings = {"timeout_s": 3.0, "retries": 0, "polite_connections": 64, **settings}
    settings |= {"robots": "ignore", "requests_per_s": None, "contact": "https://lab.example"}
    made = DownloadSettings(allow_networks=("127.0.0.0/8", "::1/128"), **settings)
    detour = Detour.parse(web.connect_to) if web else None
    fetching = Transport(made, detour, lambda: False)
    yield fetching
    fetching.close()


def test_the_canaries_sing() -> None:
    """Without our guard most spellings of loopback do reach it: the vectors are no straw men."""
    server = HostileWeb()
    curl = pycurl.Curl()
    curl.setopt(pycurl.TIMEOUT_MS, 2000)
    curl.setopt(pycurl.PROXY, "")
    curl.setopt(pycurl.WRITEFUNCTION, lambda data: None)
    reached = 0
    for host in LOOPBACK_HOSTS:
        if host.isascii() and not host.startswith("["):
            curl.setopt(pycurl.URL, f"http://{host}:{server.port}/ok.jpg")
            before = len(server.hits)
            try:
                curl.perform()
            except pycurl.error:
                continue
            reached += len(server.hits) > before
    curl.close()
    server.close()
    assert reached >= 15


@pytest.mark.parametrize("way", ["directly", "by a redirect", "by a chain of redirects"])
def test_no_vector_reaches_a_canary(
    web: HostileWeb, canaries: list[HostileWeb], vectors: list[str], way: str
) -> None:
    assert len(vectors) >= 60
    asked = vectors
    if way != "directly":
        asked = [f"http://a.example/redirect?to={quote(vector)}" for vector in asked]
    if way == "by a chain of redirects":
        asked = [f"http://b.example/redirect?to={quote(url)}" for url in asked]
    with transport(web) as made, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(made.fetch, asked))
    for vector, answer in zip(vectors, answers, strict=True):
        assert answer.reason in HARMLESS, (vector, answer)
        assert not answer.body, vector
        assert DECOY not in f"{answer.body!r}{answer.detail}", vector
    assert [server.connections for server in canaries] == [0] * len(CANARIES)
    if way != "directly":
        assert len(web.hits) >= len(vectors)


def test_the_detours_own_address_is_no_exception(web: HostileWeb) -> None:
    with transport(web) as made:
        for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
            assert made.fetch(f"http://{host}:{web.port}/ok.jpg").reason == "blocked_address"
    assert web.connections == 0


@pytest.mark.parametrize("form", SCHEMES)
def test_other_schemes_are_told_before_anything_is_asked(form: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        checked(form.format(port=8080, decoy=tmp_path / "decoy.txt"))
    assert refused.value.reason == "blocked_scheme"


ANSWERS = [
    ["127.0.0.2"],
    ["::1"],
    ["::ffff:127.0.0.2"],
    ["64:ff9b::7f00:2"],
    ["8.8.8.8", "127.0.0.2"],  # the public address does not answer; the next one would
    ["2001:4860:4860::8888", "8.8.8.8", "::1", "127.0.0.1"],
    ["10.0.0.1", "169.254.169.254", "127.0.0.1"],
]


def test_a_resolver_that_changes_its_mind_gains_nothing(
    web: HostileWeb, canaries: list[HostileWeb], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name answers with public addresses first and private ones later, or with both at once."""
    port = canaries[0].port
    name = "rebind.test"
    asked: list[str] = []
    answers = iter([[public] for public in ("8.8.8.8", "1.1.1.1")] + ANSWERS)
    judge, get = Connection._open_socket, Connection.get

    def resolve(connection: Connection, url: str, *rest: Any) -> Any:
        if url.startswith(f"http://{name}:"):
            entry = f"{name}:{port}:{','.join(next(answers))}"
            connection.curl.setopt(pycurl.RESOLVE, [f"-{name}:{port}", entry])
        return get(connection, url, *rest)

    def watch(connection: Connection, purpose: int, address: Any) -> socket.socket | int:
        number = address[3][0]
        number = number.decode() if isinstance(number, bytes) else number
        asked.append(number)
        verdict = judge(connection, purpose, address)
        if is_public(number) and not isinstance(verdict, int):  # a test asks nobody out there
            verdict.close()
            return int(pycurl.SOCKET_BAD)
        return verdict

    monkeypatch.setattr(Connection, "get", resolve)
    monkeypatch.setattr(Connection, "_open_socket", watch)
    with transport(web) as made:
        for _ in range(2):
            assert made.fetch(f"http://{name}:{port}/ok.jpg").reason == "connect"
        for expected in ANSWERS:
            redirect = quote(f"http://{name}:{port}/ok.jpg")
            asked.clear()
            answer = made.fetch(f"http://a.example/redirect?to={redirect}")
            assert answer.reason == "blocked_address", (expected, answer)
            assert {web.host, *asked} == {web.host, *expected}
    assert [server.connections for server in canaries] == [0] * len(CANARIES)


def test_networks_of_ones_own_are_refused_though_they_are_public() -> None:
    own = ("8.8.8.0/24", "2001:4860::/32")
    settings = DownloadSettings(contact="https://lab.example", retries=0, refuse_networks=own)
    made = Transport(settings, None, lambda: False)
    connection = made._connection("a.example")
    for number in ("8.8.8.8", "2001:4860:4860::8888"):
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        verdict = connection._open_socket(0, (family, socket.SOCK_STREAM, 0, (number, 443)))
        assert (verdict, connection._blocked) == (int(pycurl.SOCKET_BAD), number)
    allowed = connection._open_socket(0, (socket.AF_INET, socket.SOCK_STREAM, 0, ("8.8.4.4", 443)))
    assert not isinstance(allowed, int)
    made.close()
