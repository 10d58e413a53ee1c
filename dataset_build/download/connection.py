"""One HTTP request within bounds: time, bytes, and only to the public internet.

libcurl does the transfer and asks before it opens each socket, so what is judged is the very
number it connects to: no redirect, odd spelling or second DNS answer gets past that.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin

import pycurl

from dataset_build.addresses import is_public, within
from dataset_build.download import DownloadSettings, probe
from dataset_build.download.opt_out import opts_out, product_token
from dataset_build.download.transfers import Transfers
from pipeline.http import retry_after_s

_DISCARDED = 64 << 10  # bytes of an unwanted body read to keep the connection; beyond, it is closed
_MAX_HEADER_LINES = 1000
_KEPT_S = 30  # how long a connection stays open for the next request
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TLS_ERRORS = frozenset({35, 51, 53, 54, 58, 59, 60, 64, 66, 80, 82, 83, 90, 91, 98})
# What says nothing of an address: no memory, a callback that raised, no authorities to be read.
_OWN_ERRORS = frozenset({pycurl.E_FAILED_INIT, pycurl.E_WRITE_ERROR, pycurl.E_OUT_OF_MEMORY, 77})
_STATUS = re.compile(rb"HTTP/\S+ +([0-9]{3})\b")
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ERRORS = {
    pycurl.E_URL_MALFORMAT: "malformed_url",
    pycurl.E_COULDNT_RESOLVE_HOST: "dns",
    pycurl.E_COULDNT_CONNECT: "connect",
    pycurl.E_OPERATION_TIMEDOUT: "timeout",
    pycurl.E_FILESIZE_EXCEEDED: "too_large",
    pycurl.E_PARTIAL_FILE: "truncated",
    pycurl.E_GOT_NOTHING: "connection_lost",
    pycurl.E_SEND_ERROR: "connection_lost",
    pycurl.E_RECV_ERROR: "connection_lost",
    pycurl.E_UNSUPPORTED_PROTOCOL: "bad_response",  # HTTP/0.9; other schemes never get this far
    8: "bad_response",  # CURLE_WEIRD_SERVER_REPLY
    100: "bad_response",  # CURLE_TOO_LARGE: headers without end
}


@dataclass(frozen=True)
class Answer:
    """What became of one address; `body` is whole if `reason` is "ok", else empty."""

    reason: str
    detail: str = ""
    status: int = 0
    """HTTP status; 0 if there was no answer."""
    url: str = ""
    """The last address asked."""
    body: bytes = b""
    received: int = 0
    """Bytes of bodies received over all requests."""
    requests: int = 0
    redirect: str = ""
    retry_after_s: float = 0.0

    def after(self, received: int, requests: int) -> Answer:
        """This one, with what was received by requests before it."""
        if not requests:
            return self
        return replace(self, received=received + self.received, requests=requests + self.requests)


@dataclass(frozen=True)
class Detour:
    """Hosts under `suffix` are served by one address: how a made-up web is reached."""

    suffix: str
    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Detour:
        """From `.suffix=address:port`."""
        match = re.fullmatch(r"(\.[\w.-]+)=([\d.]+):(\d+)", text)
        assert match, f"OPENWIT_CONNECT_TO: {text!r} is not of the form .suffix=address:port"
        return cls(match[1].lower(), match[2], int(match[3]))


class _Socket(socket.socket):
    """libcurl works on a duplicate; this object is closed as soon as it is dropped."""

    def __del__(self) -> None:
        self.close()


class Connection:
    """One libcurl handle of one thread. With a detour it reaches that address and no other.

    Certificates are judged by the machine's authorities, or by those in the file that
    `SSL_CERT_FILE` names, as with most programs.
    """

    def __init__(
        self,
        settings: DownloadSettings,
        transfers: Transfers,
        detour: Detour | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._transfers = transfers
        self._detour = detour
        self._networks = tuple(map(ipaddress.ip_network, settings.allow_networks))
        self._refused = tuple(map(ipaddress.ip_network, settings.refuse_networks))
        self._token = product_token(settings.user_agent)
        self._stopping = stopping
        self._body = bytearray()
        self._received = 0
        self._begin()
        curl = self.curl = pycurl.Curl()
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        if authorities := os.environ.get("SSL_CERT_FILE"):
            curl.setopt(pycurl.CAINFO, authorities)
        curl.setopt(pycurl.PROXY, "")  # a proxy would decide on the address in our place
        curl.setopt(pycurl.NOPROXY, "*")
        curl.setopt(pycurl.USERAGENT, settings.agent)
        headers = ["Accept: image/*, */*;q=0.1", "Accept-Encoding: identity"]
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.BUFFERSIZE, 256 << 10)
        curl.setopt(pycurl.MAXAGE_CONN, _KEPT_S)
        curl.setopt(pycurl.MAXFILESIZE_LARGE, settings.max_bytes)
        curl.setopt(pycurl.LOW_SPEED_LIMIT, settings.slow_bytes_per_s)
        curl.setopt(pycurl.LOW_SPEED_TIME, settings.slow_s)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.HEADERFUNCTION, self._header)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        if detour:
            curl.setopt(pycurl.CONNECT_TO, [f"::{detour.address}:{detour.port}"])

    def get(self, url: str, end: float, text_bytes: int = 0) -> Answer:
        """One request without redirects, over by the monotonic time `end`.

        With `text_bytes`, so many first bytes of whatever comes are the body: no picture is
        expected, and nobody's opt-out read. What fails here and not there raises.
        """
        left_s = end - time.monotonic()
        if left_s <= 0:
            return Answer("timeout", url=url)
        self._begin(text_bytes)
        curl = self.curl
        curl.setopt(pycurl.URL, url)
        curl.setopt(pycurl.MAXFILESIZE_LARGE, 0 if text_bytes else self._settings.max_bytes)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, int(left_s * 1000)))
        connect_s = min(left_s, self._settings.connect_timeout_s)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(connect_s * 1000)))
        error = self._transfers.perform(curl)
        body = bytes(self._body)
        self._body = bytearray()
        if self._failure is not None:
            raise self._failure
        reason, detail = self._judge(error)
        if reason == "ok":
            return Answer(reason, detail, self._status, url, body, self._received, 1)
        answer = Answer(reason, detail, self._status, url, b"", self._received, 1)
        if reason == "redirect":
            given = curl.getinfo_raw(pycurl.REDIRECT_URL) or b""  # bytes, of whatever encoding
            target = given.decode(errors="replace") or self._location(url)
            if not target:
                return replace(answer, reason="too_many_redirects", detail="no target")
            return replace(answer, redirect=target)
        asked = dict(self._headers).get("retry-after", "")
        return replace(answer, retry_after_s=retry_after_s(asked))

    def _judge(self, error: int) -> tuple[str, str]:
        """Reason and detail of the request that has just ended with a libcurl error code."""
        status = self._status
        if self._refusal:
            return self._refusal
        if error == pycurl.E_ABORTED_BY_CALLBACK and self._stopping():
            return "stopped", ""
        if self._headed and status != 200:  # whatever befell the body, the status says it
            if status in _REDIRECTS:
                return "redirect", ""
            return _by_status(status), f"HTTP {status}"
        if error == pycurl.E_COULDNT_CONNECT and self._blocked:
            return "blocked_address", self._blocked
        if error in _OWN_ERRORS:
            raise RuntimeError(f"libcurl error {error}: {self.curl.errstr()}")
        if error:
            name = "tls" if error in _TLS_ERRORS else _ERRORS.get(error, "fetch_failed")
            return name, f"libcurl error {error}"
        if not self._checked:  # shorter than the magic bytes
            return "not_an_image", f"{self._received} bytes"
        return "ok", ""

    def _begin(self, text_bytes: int = 0) -> None:
        self._text_bytes = text_bytes
        self._status = 0
        self._headed = False
        self._lines = 0
        self._headers: list[tuple[str, str]] = []
        self._body = bytearray()
        self._received = 0
        self._checked = text_bytes > 0
        self._refusal: tuple[str, str] | None = None
        self._blocked = ""
        self._failure: OSError | None = None

    def _open_socket(self, purpose: int, address: tuple[int, int, int, Any]) -> socket.socket | int:
        """libcurl's question before each connection: here the address is judged."""
        family, kind, protocol, target = address
        if family in (socket.AF_INET, socket.AF_INET6):
            number, port = target[0], target[1]
            if isinstance(number, bytes):
                number = number.decode()
            if self._detour is None:
                allowed = is_public(number) and not within(number, self._refused)
                blocked = number
            else:
                allowed = (number, port) == (self._detour.address, self._detour.port)
                allowed = allowed and (is_public(number) or within(number, self._networks))
                blocked = f"{number} is outside download.allow_networks"
            if allowed:
                return self._socket(family, kind, protocol)
            self._blocked = blocked
        return int(pycurl.SOCKET_BAD)

    def _socket(self, family: int, kind: int, protocol: int) -> socket.socket | int:
        try:
            return _Socket(family, kind, protocol)
        except OSError as error:  # libcurl would take it for the address's failure
            if error.errno in _SHORT:
                self._failure = error
            return int(pycurl.SOCKET_BAD)

    def _header(self, line: bytes) -> int | None:
        self._lines += 1
        if self._lines > _MAX_HEADER_LINES:  # libcurl bounds an answer's, not interim answers'
            self._refusal = ("bad_response", "headers without end")
            return -1
        if code := line[:5] == b"HTTP/" and _STATUS.match(line):  # also after an interim 1xx answer
            self._status = int(code[1])
            self._headers = []
        elif line in (b"\r\n", b"\n"):
            self._headed = self._status >= 200
            wanted = self._status == 200 or self._status in _REDIRECTS
            wanted = wanted and not self._text_bytes
            if wanted and self._settings.honour_opt_out and opts_out(self._headers, self._token):
                self._refusal = ("opt_out", "response header")
                return -1
        else:
            name, _, value = line.decode("latin-1").partition(":")
            self._headers.append((name.strip().lower(), value.strip()))
        return None

    def _write(self, data: bytes) -> int | None:
        self._received += len(data)
        if self._status != 200:
            return None if self._received <= _DISCARDED else -1
        if self._text_bytes:
            self._body += data[: self._text_bytes - len(self._body)]
            if len(self._body) < self._text_bytes:
                return None
            self._refusal = ("ok", "")  # the rest is not read
            return -1
        if self._received > self._settings.max_bytes:
            self._refusal = ("too_large", f"more than {self._settings.max_bytes} bytes")
            self._body = bytearray()
            return -1
        self._body += data
        if not self._checked and len(self._body) >= probe.MAGIC_BYTES:
            self._checked = True
            head = bytes(self._body[: probe.MAGIC_BYTES])
            if probe.kind(head) not in self._settings.formats:
                self._refusal = ("not_an_image", f"begins with {head[:8].hex()}")
                return -1
        return None

    def _location(self, url: str) -> str:
        """Where a redirect leads whose body did not end well, which libcurl then does not say."""
        location = dict(self._headers).get("location", "").encode("latin-1")
        try:
            return urljoin(url, location.decode(errors="replace")) if location else ""
        except ValueError:
            return ""


def _by_status(status: int) -> str:
    if status in (404, 410):
        return "dead_link"
    if status in (401, 402, 403, 451):
        return "forbidden"
    if status == 429:
        return "too_many_requests"
    if 400 <= status < 500:
        return "client_error"
    return "server_error" if 500 <= status < 600 else "unexpected_status"
