from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest

from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Answer, Detour
from dataset_build.download.transport import Refused, Transport, checked

Fetch = Callable[..., Answer]


@contextmanager
def transport(web: Any, **settings: Any) -> Iterator[Transport]:
    rules = {"robots": "ignore", "requests_per_s": None}
    settings = {"timeout_s": 1.5, "max_bytes": 1 << 20, "retries": 0, **rules, **settings}
    settings.setdefault("allow_networks", ("127.0.0.0/8",))
    made = Transport(DownloadSettings(**settings), Detour.parse(web.connect_to), lambda: False)
    yield made
    made.close()


@pytest.fixture
def fetch(web: Any) -> Iterator[Fetch]:
    with transport(web) as made:
        yield lambda path: made.fetch("http://a.example" + path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:word@a.example/", "malformed_url"),
        ("http://a.example\\@127.0.0.1/", "malformed_url"),
        ("http:///ok.jpg", "malformed_url"),
        ("http://a.example:99999/", "malformed_url"),
        ("http://a b.example/", "malformed_url"),
        ("http://[::1/", "malformed_url"),
        ("http://a.example/" + "x" * 9000, "malformed_url"),
        (f"http://{'a.' * 130}example/", "malformed_url"),
        (f"http://{'a' * 64}.example/", "malformed_url"),
        ("http://a..example/", "malformed_url"),
        ("http://a.example:22/", "blocked_port"),
        ("http://a.example:25/", "blocked_port"),
    ],
)
def test_addresses_that_are_not_asked(url: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        checked(url)
    assert refused.value.reason == reason


def test_international_addresses_are_spelled_out() -> None:
    assert checked("http://bücher.example/é ü.jpg?q=ñ#top") == (
        "http://xn--bcher-kva.example/%C3%A9%20%C3%BC.jpg?q=%C3%B1",
        "xn--bcher-kva.example",
    )
    assert checked("HTTP://A.Example/%C3%A9?a=b&c=%20") == (
        "http://a.example/%C3%A9?a=b&c=%20",
        "a.example",
    )


def test_a_slow_transfer_is_given_up_early(web: Any) -> None:
    start = time.monotonic()
    with transport(web, timeout_s=15, slow_s=1) as made:
        assert made.fetch("http://a.example/drip-body").reason == "timeout"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("path", ["/endless", "/endless-chunked", "/huge"])
def test_no_address_sends_more_than_it_may(fetch: Fetch, path: str) -> None:
    answer = fetch(path)
    assert answer.reason == "too_large"
    assert answer.received <= (1 << 20) + (64 << 10)
    assert not answer.body


def test_a_file_of_just_the_limit_passes(web: Any) -> None:
    from dataset_build.download.probe import kind

    with transport(web) as made:
        size = len(made.fetch("http://a.example/large.jpg").body)
    with transport(web, max_bytes=size) as made:
        assert kind(made.fetch("http://a.example/large.jpg").body) == "jpeg"
    with transport(web, max_bytes=size - 1) as made:
        assert made.fetch("http://a.example/large.jpg").reason == "too_large"


@pytest.mark.parametrize(
    ("path", "reason", "requests"),
    [
        ("/noise", "bad_response", 1),
        ("/hangup", "connection_lost", 1),
        ("/short", "truncated", 1),
        ("/loop", "too_many_redirects", 6),
        ("/nowhere", "too_many_redirects", 1),
        ("/status/410", "dead_link", 1),
        ("/status/401", "forbidden", 1),
        ("/status/451", "forbidden", 1),
        ("/status/503", "server_error", 1),
        ("/status/429", "too_many_requests", 1),
        ("/status/406", "client_error", 1),
        ("/status/206", "unexpected_status", 1),
        ("/page.html", "not_an_image", 1),
        ("/redirect?to=/redirect%3Fto%3D/ok.jpg", "ok", 3),
    ],
)
def test_reasons(fetch: Fetch, path: str, reason: str, requests: int) -> None:
    answer = fetch(path)
    assert (answer.reason, answer.requests) == (reason, requests)


def test_nobody_listening(web: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    detour = Detour(".example", "127.0.0.1", port)
    settings = DownloadSettings(retries=0, allow_networks=("127.0.0.0/8",))
    made = Transport(settings, detour, lambda: False)
    assert made.fetch("http://a.example/ok.jpg").reason == "connect"
    made.close()


def test_opt_outs_end_the_transfer_on_every_hop(web: Any, fetch: Fetch) -> None:
    for header in ("X-Robots-Tag: noai", "tdm-reservation: 1", "X-Robots-Tag: openwit: noindex"):
        answer = fetch(f"/large.jpg?header={quote(header)}")
        assert answer.reason == "opt_out"
        assert not answer.body
    hop = quote("X-Robots-Tag: none")
    assert fetch(f"/redirect?to=/ok.jpg&header={hop}").reason == "opt_out"
    assert fetch(f"/status/404?header={hop}").reason == "dead_link"
    other = quote("X-Robots-Tag: googlebot: noindex")
    assert fetch(f"/large.jpg?header={other}").reason == "ok"
    with transport(web, honour_opt_out=False) as made:
        url = "http://a.example/ok.jpg?header=X-Robots-Tag:%20noai"
        assert made.fetch(url).reason == "ok"


def test_a_passing_error_is_retried_after_the_time_asked_for(web: Any) -> None:
    with transport(web, retries=1, timeout_s=5) as made:
        start = time.monotonic()
        answer = made.fetch("http://a.example/flaky")
    assert answer.reason == "ok"
    assert answer.requests == 2
    assert time.monotonic() - start >= 1.0  # Retry-After: 1


def test_a_longer_wait_than_there_is_time_for_is_not_begun(web: Any) -> None:
    header = quote("Retry-After: 60")
    with transport(web, retries=3) as made:
        start = time.monotonic()
        answer = made.fetch(f"http://a.example/status/429?header={header}")
    assert answer.reason == "too_many_requests"
    assert web.hits == [f"/status/429?header={header}"]
    assert time.monotonic() - start < 30


def test_permanent_errors_are_not_retried(web: Any) -> None:
    with transport(web, retries=3) as made:
        made.fetch("http://a.example/status/404")
    assert len(web.hits) == 1


def test_a_domain_is_asked_politely(web: Any) -> None:
    urls = [f"http://host{i}.site.example/picture/{i}?wait=0.05" for i in range(16)]
    with transport(web, polite_connections=2) as made, ThreadPoolExecutor(16) as pool:
        assert {answer.reason for answer in pool.map(made.fetch, urls)} == {"ok"}
    assert web.most_active <= 2


def test_time_in_the_queue_is_not_the_addresss_own(web: Any) -> None:
    urls = [f"http://site.example/picture/{i}?wait=0.4" for i in range(8)]
    with (
        transport(web, polite_connections=1, timeout_s=1.5) as made,
        ThreadPoolExecutor(8) as pool,
    ):
        assert {answer.reason for answer in pool.map(made.fetch, urls)} == {"ok"}


def test_connections_are_reused(web: Any, fetch: Fetch) -> None:
    for _ in range(10):
        assert fetch("/ok.jpg").reason == "ok"
    assert web.connections == 1


def test_the_request_is_honest(web: Any) -> None:
    with transport(web, contact="https://lab.test/crawl") as made:
        made.fetch("http://a.example/ok.jpg")
    (head,) = web.heads
    assert "User-Agent: openwit/0.1 (+https://lab.test/crawl)" in head
    assert "Accept-Encoding: identity" in head
    assert "Host: a.example\r\n" in head
    assert "Cookie" not in head
    assert "Referer" not in head


def test_proxies_of_the_environment_are_not_asked(
    web: Any, canary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    with transport(web) as made:
        assert made.fetch("http://a.example/ok.jpg").reason == "ok"
    assert canary.connections == 0


def test_a_stop_ends_a_silent_transfer(web: Any) -> None:
    stop = threading.Event()
    settings = DownloadSettings(timeout_s=15, slow_s=15, allow_networks=("127.0.0.0/8",))
    made = Transport(settings, Detour.parse(web.connect_to), stop.is_set)
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    start = time.monotonic()
    assert made.fetch("http://a.example/mute").reason == "stopped"
    assert time.monotonic() - start < 4
    timer.join()
    made.close()


def test_a_detour_leads_only_into_networks_that_are_let_in(web: Any) -> None:
    for networks in ((), ("10.0.0.0/8", "127.0.0.0/32"), ("::1/128",)):
        with transport(web, allow_networks=networks) as made:
            answer = made.fetch("http://a.example/ok.jpg")
        assert answer.reason == "blocked_address"
        assert answer.detail == "127.0.0.1 is outside download.allow_networks"
    assert web.connections == 0
    with transport(web, allow_networks=("127.0.0.1/32",)) as made:
        assert made.fetch("http://a.example/ok.jpg").reason == "ok"


@pytest.mark.parametrize("block", ["127.0.0.1/8", "loopback", "127.0.0.0/33"])
def test_a_network_must_be_one(block: str) -> None:
    with pytest.raises(ValueError, match="allow_networks"):
        DownloadSettings(allow_networks=(block,))


def test_a_detour_must_be_written_out() -> None:
    assert Detour.parse(".example=127.0.0.1:80") == Detour(".example", "127.0.0.1", 80)
    with pytest.raises(AssertionError, match="OPENWIT_CONNECT_TO"):
        Detour.parse("example")


def serve(monkeypatch: pytest.MonkeyPatch, web: Any, answers: dict[str, bytes]) -> None:
    """Let the web answer some targets with these very bytes."""
    own = type(web)._answer

    def answer(served: Any, client: Any, target: str) -> bool:
        if target in answers:
            client.sendall(answers[target])
            return True
        return bool(own(served, client, target))

    monkeypatch.setattr(type(web), "_answer", answer)


def test_what_no_server_should_say_is_an_answer_like_others(
    web: Any, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, empty = b"HTTP/1.1 %s x\r\nContent-Length: 0\r\n", b"\r\n"
    moved = head % b"302"
    odd = {
        "/superscript": head % b"503" + b"Retry-After: \xb2\r\n" + empty,
        "/latin": moved + b"Location: /caf\xe9.jpg\r\n" + empty,
        "/host": moved + b"Location: http://caf\xe9.example/ok.jpg\r\n" + empty,
        "/long": moved + b"Location: /" + b"x" * 90_000 + b"\r\n" + empty,
        "/digits": head % b"404" + b"HTTP/1.1 " + b"9" * 5000 + b": x\r\n" + empty,
    }
    serve(monkeypatch, web, odd)
    assert fetch("/superscript").reason == "server_error"
    assert fetch("/latin").url == "http://a.example/caf%E9.jpg"
    assert fetch("/host").reason == "malformed_url"
    answer = fetch("/long")
    assert (answer.reason, len(answer.url)) == ("malformed_url", 8192)
    assert fetch("/digits").reason in ("dead_link", "bad_response")
    assert fetch("/ok.jpg").reason == "ok"
