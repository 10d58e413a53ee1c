"""Each kind of misbehaviour over loopback, and the server's life."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import UserError
from sample_web import dirt
from sample_web.pairs import picture
from sample_web.stage import serve


@pytest.fixture
def canary(server: Any) -> Iterator[Path]:
    path = server.web.run.stage_folder("sample_web") / "logs" / "canary.txt"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def opened(server: Any, host: str, path: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return client


def test_pictures_are_served_as_rendered_over_one_connection(server: Any) -> None:
    base = server.connect()
    bodies = set()
    for host, path in server.addresses("")[:20]:
        if not path.isascii():
            continue
        base.request("GET", path, headers={"Host": host})
        response = base.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (200, "image/jpeg")
        bodies.add(response.read())
    base.close()
    rendered = {picture(server.web.settings, index) for index in range(240)}
    assert len(bodies) > 10
    assert bodies <= rendered


def test_addresses_outside_ascii_are_found_escaped(server: Any) -> None:
    host, path = next(pair for pair in server.addresses("") if "größe" in pair[1])
    response, _ = server.get(host, path)
    assert response.status == 200


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [("not_found", {404, 410}), ("forbidden", {403}), ("server_error", {500, 503})],
)
def test_errors(server: Any, kind: str, statuses: set[int]) -> None:
    answers = [server.get(*address)[0] for address in server.addresses(kind)]
    assert {answer.status for answer in answers} <= statuses
    assert answers


def test_unknown_hosts_and_paths_are_missing(server: Any) -> None:
    host, _ = server.addresses("")[0]
    assert server.get("gone1.nowhere.example", "/1.jpg")[0].status == 404
    assert server.get(host, "/no/such/page")[0].status == 404


def test_redirects_end_well(server: Any) -> None:
    hops = set()
    for host, path in server.addresses("redirect"):
        response, body = server.get(host, path)
        count = 0
        while response.status != 200:
            path = response.headers["Location"].removeprefix(f"http://{host}")
            response, body = server.get(host, path)
            count += 1
        Image.open(io.BytesIO(body)).load()
        hops.add(count)
    assert hops == {1, 2, 3}


def test_redirects_to_private_addresses_know_the_port(server: Any) -> None:
    found = [server.get(*a)[0].headers["Location"] for a in server.addresses("redirect_private")]
    assert any(f"http://127.0.0.1:{server.port}/canary/" in location for location in found)
    assert any("169.254.169.254" in location for location in found)
    assert not any("{" in location for location in found)


def test_redirect_loops_loop(server: Any) -> None:
    host, path = server.addresses("redirect_loop")[0]
    first = server.get(host, path)[0].headers["Location"]
    assert server.get(host, first)[0].headers["Location"] == path


def test_redirects_to_other_schemes(server: Any) -> None:
    answers = [server.get(*address)[0] for address in server.addresses("redirect_file")]
    schemes = {answer.headers["Location"].split(":")[0] for answer in answers}
    assert "file" in schemes
    assert "http" not in schemes


def test_html_is_served_at_a_pictures_address(server: Any) -> None:
    host, path = server.addresses("html_as_picture")[0]
    response, body = server.get(host, path)
    assert path.endswith(".jpg")
    assert response.headers["Content-Type"].startswith("text/html")
    assert body.startswith(b"<!doctype html>")


def test_a_short_body_ends_before_its_declared_length(server: Any) -> None:
    client = opened(server, *server.addresses("short_body")[0])
    received = b""
    while part := client.recv(65536):
        received += part
    client.close()
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    assert 0 < len(body) < length


def test_a_cut_picture_is_sent_whole_but_does_not_decode(server: Any) -> None:
    response, body = server.get(*server.addresses("cut_picture")[0])
    assert len(body) == int(response.headers["Content-Length"])
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(body)).load()


def test_slow_answers_drip_in_header_or_body(server: Any) -> None:
    clients = [opened(server, *address) for address in server.addresses("slow")]
    time.sleep(0.3)
    received = [client.recv(65536) for client in clients]
    assert {b"\r\n\r\n" in part for part in received} == {True, False}
    for client in clients:
        assert 1 <= len(client.recv(65536)) <= 3
        client.close()


def test_endless_bodies_do_not_end(server: Any) -> None:
    heads = set()
    for address in server.addresses("endless"):
        client = opened(server, *address)
        size = 0
        first = client.recv(65536)
        heads.add(b"chunked" in first.partition(b"\r\n\r\n")[0])
        while size < 4 << 20:
            size += len(client.recv(1 << 20))
        client.close()
    assert heads == {True, False}
    # The server is none the worse for the clients that left.
    assert server.get(*server.addresses("")[0])[0].status == 200


def test_the_pixel_bomb_is_small_and_claims_to_be_large(server: Any) -> None:
    _, body = server.get(*server.addresses("pixel_bomb")[0])
    assert len(body) < 40_000
    with pytest.warns(Image.DecompressionBombWarning):
        assert Image.open(io.BytesIO(body)).size == (12_000, 12_000)


def test_opt_outs_are_said_in_headers(server: Any) -> None:
    said = set()
    for address in server.addresses("opt_out"):
        response, body = server.get(*address)
        Image.open(io.BytesIO(body)).load()
        said |= {(response.headers["X-Robots-Tag"], response.headers["tdm-reservation"])}
    assert said == {
        ("noai", None),
        ("noai, noimageai", None),
        ("noindex, noimageai", None),
        (None, "1"),
    }


def test_robots_forbid_one_host(server: Any) -> None:
    assert {host for host, _ in server.addresses("robots")} == {dirt.ROBOTS_HOST}
    assert b"Disallow: /\n" in server.get(dirt.ROBOTS_HOST, "/robots.txt")[1]
    assert b"Allow: /\n" in server.get("meadow.example", "/robots.txt")[1]


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<svg"), ("tracking_pixel", b"GIF89a")])
def test_other_formats(server: Any, kind: str, start: bytes) -> None:
    assert server.get(*server.addresses(kind)[0])[1].startswith(start)


def test_the_tracking_pixel_is_one_pixel(server: Any) -> None:
    _, body = server.get(*server.addresses("tracking_pixel")[0])
    assert Image.open(io.BytesIO(body)).size == (1, 1)


def test_placeholders_are_one_picture(server: Any) -> None:
    bodies = {server.get(*address)[1] for address in server.addresses("placeholder")}
    assert len(bodies) == 1
    Image.open(io.BytesIO(bodies.pop())).load()


def test_an_alias_is_the_same_picture_elsewhere(server: Any) -> None:
    shown = {picture(server.web.settings, index) for index in range(240)}
    assert {server.get(*address)[1] for address in server.addresses("alias")} <= shown


def test_mirrors_need_no_route(server: Any) -> None:
    response, body = server.get("mirror5.example", "/mirror/17/99.jpg")
    assert response.status == 200
    assert body == picture(server.web.settings, 17)
    assert server.get("mirror5.example", "/mirror/999999/1.jpg")[0].status == 404


def test_forbidden_requests_are_written_down(server: Any, canary: Path) -> None:
    server.get("meadow.example", "/robots.txt")
    assert not canary.exists()
    server.get(f"127.0.0.1:{server.port}", "/secret")
    server.get("meadow.example", "/canary/x.jpg")
    assert canary.read_text() == "127.0.0.1/secret\nmeadow.example/canary/x.jpg\n"


def test_bad_requests_are_refused(server: Any) -> None:
    for request, status in ((b"NONSENSE\r\n\r\n", b"400"), (b"PUT / HTTP/1.1\r\n\r\n", b"405")):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        client.sendall(request)
        assert client.recv(1000).split()[1] == status
        assert client.recv(1000) == b""
        client.close()


def test_a_head_request_gets_no_body(server: Any) -> None:
    base = server.connect()
    host, path = next(pair for pair in server.addresses("") if pair[1].isascii())
    for _ in range(2):  # a body would be read as the next answer's head
        base.request("HEAD", path, headers={"Host": host})
        response = base.getresponse()
        assert response.status == 200
        response.read()
    base.close()


def test_the_server_ends_with_the_context_and_leaves_a_log(web: Any) -> None:
    with serve(web.run) as environment:
        port = int(environment["OPENWIT_CONNECT_TO"].rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    assert "serving" in (web.run.stage_folder("sample_web") / "logs" / "server.log").read_text()


def test_the_server_dies_with_a_parent_that_is_killed(web: Any, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    site = web.out / "site.sqlite"
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'sample_web.server', sys.argv[1], '--port-file',"
        " sys.argv[2], '--with-parent'])\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(site), str(port_file)], cwd=root, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 20
    while not port_file.exists() and time.monotonic() < until:
        time.sleep(0.02)
    port = int(port_file.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except (ConnectionRefusedError, ConnectionResetError):
            return
        time.sleep(0.02)
    pytest.fail("the server outlived its parent")


def test_a_web_that_is_not_built_is_an_error_that_names_the_log(web: Any, tmp_path: Path) -> None:
    from pipeline.stage import Run

    with (
        pytest.raises(UserError, match=r"did not start; see .*server\.log"),
        serve(Run(tmp_path, web.run.config)),
    ):
        pass
    log = tmp_path / "sample_web" / "logs" / "server.log"
    assert "build the stage sample_web first" in log.read_text()
