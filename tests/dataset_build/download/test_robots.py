from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download import DownloadSettings, robots
from dataset_build.download.connection import Answer, Detour
from dataset_build.download.robots import MAX_BYTES, Robots, own_rules
from dataset_build.download.transport import Transport

# File, path asked for, whether it is allowed; for the crawler `openwit`.
FILES = [
    ("", "/a.jpg", True),
    ("User-agent: *\nDisallow: /", "/a.jpg", False),
    ("User-agent: *\nDisallow:", "/a.jpg", True),
    ("User-agent: *\nDisallow: /private/", "/private/a.jpg", False),
    ("User-agent: *\nDisallow: /private/", "/privately/a.jpg", True),
    ("User-agent: *\nDisallow: /private", "/privately/a.jpg", False),
    ("USER-AGENT: *\nDISALLOW: /", "/a.jpg", False),
    ("user-agent:*\ndisallow:/", "/a.jpg", False),
    ("\ufeffUser-agent: *\nDisallow: /", "/a.jpg", False),
    ("User-agent: *\r\nDisallow: /\r\n", "/a.jpg", False),
    ("User-agent: * # all\nDisallow: / # everything", "/a.jpg", False),
    ("# User-agent: *\n# Disallow: /", "/a.jpg", True),
    ("Disallow: /", "/a.jpg", True),
    ("User-agent: googlebot\nDisallow: /", "/a.jpg", True),
    ("User-agent: openwit\nDisallow: /", "/a.jpg", False),
    ("User-agent: OpenWIT\nDisallow: /", "/a.jpg", False),
    ("User-agent: openwit/0.1\nDisallow: /", "/a.jpg", False),
    ("User-agent: open\nDisallow: /", "/a.jpg", True),
    ("User-agent: openwit-images\nDisallow: /", "/a.jpg", True),
    ("User-agent: *\nDisallow: /\n\nUser-agent: openwit\nDisallow:", "/a.jpg", True),
    ("User-agent: openwit\nDisallow: /\n\nUser-agent: *\nAllow: /", "/a.jpg", False),
    ("User-agent: googlebot\nUser-agent: openwit\nDisallow: /", "/a.jpg", False),
    ("User-agent: openwit\nSitemap: /map.xml\nUser-agent: b\nDisallow: /", "/a.jpg", False),
    ("User-agent: openwit\nDisallow: /a\nUser-agent: b\nDisallow: /c", "/c.jpg", True),
    ("User-agent: openwit\nDisallow: /a\n\nUser-agent: openwit\nDisallow: /c", "/c.jpg", False),
    ("User-agent: *\nDisallow: /a\n\nDisallow: /c", "/c.jpg", False),
    ("User-agent: *\nDisallow: /\nAllow: /pictures/", "/pictures/a.jpg", True),
    ("User-agent: *\nAllow: /pictures/\nDisallow: /", "/a.jpg", False),
    ("User-agent: *\nAllow: /\nDisallow: /a", "/a.jpg", False),
    ("User-agent: *\nDisallow: /a.jpg\nAllow: /a.jpg", "/a.jpg", True),
    ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg", False),
    ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg?size=2", True),
    ("User-agent: *\nDisallow: /*/thumbs/", "/x/y/thumbs/a.jpg", False),
    ("User-agent: *\nDisallow: /*?", "/a.jpg?x=1", False),
    ("User-agent: *\nDisallow: /*?", "/a.jpg", True),
    ("User-agent: *\nDisallow: /%7Ejoe/", "/~joe/a.jpg", False),
    ("User-agent: *\nDisallow: /caf\u00e9/", "/caf%C3%A9/a.jpg", False),
    ("User-agent: *\nDissallow: /", "/a.jpg", False),
    ("User-agent: *\nNoindex: /\nCrawl-delay: x", "/a.jpg", True),
    ("<html><body>not here: a page</body></html>", "/a.jpg", True),
    ("User-agent: *\nContent-Usage: train-ai=n", "/a.jpg", False),
    ("User-agent: *\nContent-Usage: search=y, train-ai=n\nAllow: /", "/a.jpg", False),
    ("User-agent: *\nContent-Usage: /art train-ai=n", "/art/a.jpg", False),
    ("User-agent: *\nContent-Usage: /art train-ai=n", "/a.jpg", True),
    ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /free train-ai=y", "/free/a", True),
    ("User-agent: *\nContent-Usage: search=n", "/a.jpg", True),
    ("User-agent: googlebot\nContent-Usage: train-ai=n", "/a.jpg", True),
]


@pytest.mark.parametrize(("text", "path", "allowed"), FILES)
def test_files(text: str, path: str, allowed: bool) -> None:
    answer = Answer("ok", status=200, body=text.encode())
    rules = Robots(lambda url: answer, "openwit", None, lambda: False).rules("http://a.example/")
    refusal, _ = rules.refusal(f"http://a.example{path}", "openwit", heeds_usage=True)
    assert (refusal == "") == allowed


# What the server answers, and what then becomes of a picture of its host.
ANSWERS = [
    (Answer("dead_link", status=404), ""),
    (Answer("dead_link", status=410), ""),
    (Answer("forbidden", status=401), ""),
    (Answer("forbidden", status=403), ""),
    (Answer("client_error", status=418), ""),
    (Answer("too_many_redirects", status=302), ""),
    (Answer("too_many_requests", status=429), "robots"),
    (Answer("server_error", status=500), "robots"),
    (Answer("server_error", status=503), "robots"),
    (Answer("unexpected_status", status=206), "robots"),
    (Answer("blocked_scheme"), "robots"),
    (Answer("blocked"), "robots"),
    (Answer("timeout"), "timeout"),
    (Answer("dns"), "dns"),
    (Answer("connect"), "connect"),
    (Answer("tls"), "tls"),
    (Answer("blocked_address"), "blocked_address"),
]


@pytest.mark.parametrize(("answer", "reason"), ANSWERS)
def test_a_file_that_cannot_be_had(answer: Answer, reason: str) -> None:
    found = Robots(lambda url: answer, "openwit", None, lambda: False).rules("http://a.example/")
    assert found.refusal("http://a.example/a.jpg", "openwit", True)[0] == reason


def test_usage_preferences_are_heeded_where_opt_outs_are() -> None:
    text = b"User-agent: *\nContent-Usage: train-ai=n\nDisallow: /no"
    answer = Answer("ok", status=200, body=text)
    rules = Robots(lambda url: answer, "openwit", None, lambda: False).rules("http://a.example/")
    assert rules.refusal("http://a.example/a", "openwit", True)[0] == "opt_out"
    assert rules.refusal("http://a.example/a", "openwit", False)[0] == ""
    assert rules.refusal("http://a.example/no", "openwit", True)[0] == "robots"


def test_of_a_file_only_what_concerns_this_crawler_is_kept() -> None:
    text = "User-agent: a\nDisallow: /\n" * 5000 + "User-agent: *\nDisallow: /x\nCrawl-delay: 3"
    assert own_rules(text, "openwit") == ("User-agent: openwit\nDisallow: /x\nCrawl-delay: 3", "")
    start = time.monotonic()
    own_rules(("a " * 100 + ":") * 2000 + " " * 100_000, "openwit")  # no pattern to get lost in
    assert time.monotonic() - start < 1


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots, "_HELD_BYTES", 1000)
    asked = []

    def ask(url: str) -> Answer:
        asked.append(url)
        return Answer("ok", status=200, body=b"User-agent: *\nDisallow: /" + b"x" * 200)

    made = Robots(ask, "openwit", None, lambda: False)
    for host in "abcda":
        made.rules(f"http://{host}.example/")
    assert [url[7] for url in asked] == ["a", "b", "c", "d", "a"]
    assert len(made._hosts) == 2
    assert made._held_bytes <= 1000


def test_a_host_is_not_forgotten_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is remembered would be counted wrongly, and in the end nothing remembered."""
    monkeypatch.setattr(robots, "_HELD_BYTES", 3000)
    asked: list[str] = []

    def ask(url: str) -> Answer:
        asked.append(url)
        time.sleep(0.002)
        return Answer("ok", status=200, body=b"User-agent: *\nDisallow: /" + b"x" * 1000)

    made = Robots(ask, "openwit", None, lambda: False)
    with ThreadPoolExecutor(1) as pool:
        with made._hosts.setdefault("http://slow.example", robots._Host()).lock:
            made._held_bytes += robots._HOST_BYTES
            list(pool.map(lambda i: made.rules(f"http://h{i}.example/"), range(20)))
        assert "http://slow.example" in made._hosts
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: made.rules(f"http://h{i % 50}.example/"), range(200)))
    assert made._held_bytes == sum(host.size for host in made._hosts.values())
    assert made._held_bytes <= 16 * 1300
    monkeypatch.setattr(robots, "_HELD_BYTES", 8 << 20)
    asked.clear()
    for _ in range(10):
        made.rules("http://small.example/")
    assert len(asked) == 1


def test_a_failure_is_remembered_for_a_minute_if_it_is_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [
        Answer("connection_lost"),
        Answer("connection_lost"),
        Answer("dead_link", status=404),
    ]
    asked: list[str] = []

    def ask(url: str) -> Answer:
        asked.append(url)
        return answers[min(len(asked), len(answers)) - 1]

    made = Robots(ask, "openwit", None, lambda: False)
    for _ in range(3):  # who had no time left learns nothing of the host
        assert made.rules("http://a.example/", is_hurried=True).reason in ("connection_lost", "")
    assert len(asked) == 3
    asked.clear()
    found = [made.rules("http://b.example/").reason for _ in range(5)]
    assert found == ["connection_lost"] * 5
    assert len(asked) == 2
    later = time.monotonic() + 61
    monkeypatch.setattr(robots.time, "monotonic", lambda: later)
    assert made.rules("http://b.example/").reason == ""
    assert made.rules("http://b.example/").reason == ""
    assert len(asked) == 3


def test_first_contact_may_fail_once(web: Any) -> None:
    own, asked = type(web)._answer, []

    def answer(served: Any, client: Any, target: str) -> bool:
        if target == "/robots.txt":
            asked.append(target)
            if len(asked) == 1:
                return False
        return bool(own(served, client, target))

    with pytest.MonkeyPatch.context() as patch, transport(web, retries=1, timeout_s=5) as made:
        patch.setattr(type(web), "_answer", answer)
        assert made.fetch("http://a.example/ok.jpg").reason == "ok"
    assert len(asked) == 2


def test_a_redirect_late_in_its_time_condemns_nobody(web: Any) -> None:
    own = type(web)._answer

    def answer(served: Any, client: Any, target: str) -> bool:
        if target == "/late":
            time.sleep(1.2)
            to = "Location: http://victim.example/ok.jpg"
            return bool(served._send(client, b"", "302 Found", to))
        if target == "/robots.txt" and served.requests[-1][1] == "victim.example":
            time.sleep(0.6)
        return bool(own(served, client, target))

    with pytest.MonkeyPatch.context() as patch, transport(web, timeout_s=1.5) as made:
        patch.setattr(type(web), "_answer", answer)
        for _ in range(3):
            assert made.fetch("http://evil.example/late").reason == "timeout"
        assert made.fetch("http://victim.example/ok.jpg").reason == "ok"


def test_a_path_in_disguise_is_disallowed_as_well(web: Any) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: *\nDisallow: /ok")
    with transport(web) as made:
        for path in ("/pub/%2e%2e/ok.jpg", "/pub/../ok.jpg", "/%2E/ok.jpg", "/a/.%2e/./ok.jpg"):
            assert made.fetch(f"http://no.example{path}").reason == "robots", path
    assert web.hits == ["/robots.txt"]


@contextmanager
def transport(web: Any, folder: Path | None = None, **settings: Any) -> Iterator[Transport]:
    settings = {"timeout_s": 1.5, "retries": 0, "requests_per_s": None, **settings}
    settings["allow_networks"] = ("127.0.0.0/8",)
    detour = Detour.parse(web.connect_to)
    made = Transport(DownloadSettings(**settings), detour, lambda: False, folder=folder)
    yield made
    made.close()


def test_a_host_is_asked_once_and_what_it_disallows_never(web: Any) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: *\nDisallow: /ok")
    with transport(web) as made, ThreadPoolExecutor(8) as pool:
        urls = ["http://no.example/ok.jpg"] * 8 + ["http://no.example/large.jpg"] * 8
        answers = list(pool.map(made.fetch, urls))
    assert [answer.reason for answer in answers] == ["robots"] * 8 + ["ok"] * 8
    assert sorted(web.hits) == ["/large.jpg"] * 8 + ["/robots.txt"]
    assert sum(answer.requests for answer in answers) == 9  # the robots.txt is accounted for


def test_a_redirect_leads_nowhere_that_is_disallowed(web: Any) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: openwit\nDisallow: /")
    with transport(web) as made:
        answer = made.fetch("http://a.example/redirect?to=http://no.example/ok.jpg")
        assert (answer.reason, answer.url) == ("robots", "http://no.example/ok.jpg")
        web.robots["b.example"] = ("302 Found", b"", "Location: http://no.example/robots.txt")
        assert made.fetch("http://b.example/ok.jpg").reason == "robots"  # by the file it leads to
    assert web.hits.count("/ok.jpg") == 0


def test_settings_decide_whether_it_is_asked(web: Any) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: *\nDisallow: /")
    with transport(web, robots="ignore") as made:
        assert made.fetch("http://no.example/ok.jpg").reason == "ok"
    assert web.hits == ["/ok.jpg"]


def test_a_long_file_is_read_to_its_limit(web: Any) -> None:
    long = (
        b"#" * (MAX_BYTES - 40) + b"\nUser-agent: *\nDisallow: /ok\nDisallow: /large" + b"#" * 10**6
    )
    web.robots["a.example"] = ("200 OK", long)
    web.robots["b.example"] = ("200 OK", b"#" * MAX_BYTES + b"\nUser-agent: *\nDisallow: /ok")
    with transport(web) as made:
        assert made.fetch("http://a.example/ok.jpg").reason == "robots"
        assert made.fetch("http://b.example/ok.jpg").reason == "ok"


def test_opt_outs_of_the_file_itself_are_not_ours_to_heed(web: Any) -> None:
    web.robots["a.example"] = ("200 OK", b"User-agent: *\nAllow: /", "X-Robots-Tag: noindex")
    with transport(web) as made:
        assert made.fetch("http://a.example/ok.jpg").reason == "ok"


@pytest.mark.parametrize("path", ["/mute", "/drip-body", "/drip-head"])
def test_a_file_that_never_comes_costs_its_host_two_deadlines(web: Any, path: str) -> None:
    for host in ("a.example", "b.example"):
        web.robots[host] = ("302 Found", b"", f"Location: http://c.example{path}")
    start = time.monotonic()
    with transport(web, threads=4) as made, ThreadPoolExecutor(4) as pool:
        urls = [f"http://{host}.example/ok.jpg" for host in "ab"] * 8
        assert {answer.reason for answer in pool.map(made.fetch, urls)} == {"timeout"}
    assert time.monotonic() - start < 2 * 1.5 + 1
    assert web.hits.count("/ok.jpg") == 0


def test_a_days_answer_serves_all_tasks_of_a_run(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: *\nDisallow: /\xc3\xa9\nDisallow: /ok")
    web.robots["busy.example"] = ("503 Busy", b"")

    def results() -> list[str]:
        with transport(web, tmp_path) as made:
            hosts = ("no", "busy", "free")
            return [made.fetch(f"http://{host}.example/ok.jpg").reason for host in hosts]

    def asked() -> int:
        return web.hits.count("/robots.txt")

    assert results() == results() == ["robots", "robots", "ok"]
    assert asked() == 3
    later = time.time() + 2 * 3600
    monkeypatch.setattr(robots.time, "time", lambda: later)
    assert results() == ["robots", "robots", "ok"]
    assert asked() == 4  # one that could not answer is soon asked again
    later += 24 * 3600
    assert results() == ["robots", "robots", "ok"]
    assert asked() == 7


def test_a_torn_line_of_the_shared_file_is_asked_for_again(web: Any, tmp_path: Path) -> None:
    web.robots["no.example"] = ("200 OK", b"User-agent: *\nDisallow: /ok")
    for _ in range(2):
        with transport(web, tmp_path) as made:
            assert made.fetch("http://no.example/ok.jpg").reason == "robots"
        (shelf,) = tmp_path.glob("robots/*/*.tsv")
        shelf.write_bytes(shelf.read_bytes()[:-9])
    assert web.hits == ["/robots.txt"] * 2
    with transport(web, tmp_path) as made:
        assert made.fetch("http://no.example/ok.jpg").reason == "robots"
    with transport(web, tmp_path) as made:
        assert made.fetch("http://no.example/ok.jpg").reason == "robots"
    assert web.hits == ["/robots.txt"] * 3
