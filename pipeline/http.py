"""A file on a web server, fetched into a local one; a fetch that was cut off goes on from there.

libcurl is what transfers: it tells a body that was cut from one that ended, and never undoes a
`Content-Encoding`, so an archive is stored with the very bytes that the server keeps.
"""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Callable
from typing import BinaryIO

import pycurl

from pipeline.config import MissingInput, UserError
from pipeline.remote import Cut, parts, shown
from pipeline.stop import Stopped

CONNECT_S = 30
STALL_S = 60
"""A transfer of less than a kilobyte a second for so long, headers included, is given up."""
_LEAST_BYTES_PER_S = 1000
_MAX_REDIRECTS = 5
_STATUS = re.compile(rb"HTTP/\S+ +([0-9]{3})\b")
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_ASK_AGAIN = frozenset({408, 412, 416, 425, 429})  # of the statuses that blame the request
# Certificates that are not valid or cannot be read; what is no address; redirects in a circle.
_FINAL = frozenset({60, 77, pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL})
_TOO_MANY_REDIRECTS = 47


class HttpFile:
    """One file at an http(s) address; `read` is called until it does not raise `Cut`.

    A try goes on from `position` by `Range`, if the server gave a strong ETag: with `If-Range`
    (RFC 9110, §13.1.5) a file that has changed since is sent whole.
    """

    def __init__(self, address: str, target: BinaryIO, stopping: Callable[[], bool]) -> None:
        self.address = shown(address)
        self.host = parts(address).netloc.rpartition("@")[2]
        self.position = 0
        """Bytes that are in `target`."""
        self.size: int | None = None
        """Of the whole file in bytes, as the server says; None while it has not."""
        self._url = address
        self._target = target
        self._stopping = stopping
        self._etag = ""
        self._failure: OSError | None = None

    def read(self, pace: Callable[[], None]) -> None:
        """Get what is missing in one request; `pace` waits until it may begin.

        Raises `Cut`, `Stopped`, `MissingInput` if the server has no such file for us, `UserError`
        if it cannot be asked at all, and what befalls the disk.
        """
        if not self._etag:
            self._start_over()
        pace()
        if self._stopping():
            raise Stopped("a stop while a file was fetched")
        self._status, self._headers = 0, dict[str, str]()
        self._refusal, self._failure = "", None
        error, words = self._perform()
        if self._failure is not None:
            raise self._failure
        if self._refusal:
            self._start_over()
            raise Cut(self._refusal)
        if error == pycurl.E_ABORTED_BY_CALLBACK:
            raise Stopped("a stop while a file was fetched")
        if error in _FINAL or error == _TOO_MANY_REDIRECTS:
            raise UserError(f"{self.address}: cannot be fetched ({words}); check the address")
        if self._status not in (0, 200, 206):  # whatever befell the body, the status says it
            self._judge_status()
        if error:
            raise Cut(words)
        if self.size is not None and self.position != self.size:
            raise Cut(f"{self.position} bytes came of {self.size}")

    def _perform(self) -> tuple[int, str]:
        """Error code of libcurl, 0 for none, and its words."""
        curl = pycurl.Curl()
        curl.setopt(pycurl.URL, self._url)
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.REDIR_PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.FOLLOWLOCATION, 1)
        curl.setopt(pycurl.MAXREDIRS, _MAX_REDIRECTS)
        curl.setopt(pycurl.USERAGENT, "openwit/0.1")
        if authorities := os.environ.get("SSL_CERT_FILE"):
            curl.setopt(pycurl.CAINFO, authorities)
        headers = ["Accept-Encoding: identity"]
        if self.position:
            headers += [f"Range: bytes={self.position}-", f"If-Range: {self._etag}"]
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.CONNECTTIMEOUT, CONNECT_S)
        curl.setopt(pycurl.LOW_SPEED_LIMIT, _LEAST_BYTES_PER_S)
        curl.setopt(pycurl.LOW_SPEED_TIME, STALL_S)
        curl.setopt(pycurl.BUFFERSIZE, 256 << 10)
        curl.setopt(pycurl.HEADERFUNCTION, self._header)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        curl.setopt(pycurl.NOPROGRESS, 0)
        curl.setopt(pycurl.XFERINFOFUNCTION, lambda *_: int(self._stopping()))
        try:
            curl.perform()
        except pycurl.error as error:
            return error.args[0], str(error.args[1])
        finally:
            curl.close()
        return 0, ""

    def _judge_status(self) -> None:
        status = self._status
        if status in (412, 416):  # the file is not that of which a part is here
            self._start_over()
        if status >= 500 or status in _ASK_AGAIN:
            raise Cut(f"HTTP {status}", retry_after_s(self._headers.get("retry-after", "")))
        raise MissingInput(
            f"{self.address}: HTTP {status}: the server does not give this file; check the address,"
            " and the list that names it"
        )

    def _header(self, line: bytes) -> int | None:
        if code := _STATUS.match(line):  # also after a redirect or an interim 1xx answer
            self._status, self._headers = int(code[1]), {}
        elif line.strip():
            name, _, value = line.decode("latin-1").partition(":")
            self._headers[name.strip().lower()] = value.strip()
        elif self._status in (200, 206):
            return self._begin()
        return None

    def _begin(self) -> int | None:
        """The body is about to come: of what, and from where on."""
        try:
            if self._status == 200:
                self._start_over()
                etag = self._headers.get("etag", "")
                self._etag = "" if etag.startswith("W/") else etag
                length = self._headers.get("content-length", "")
                self.size = int(length) if length.isdecimal() else None
                return None
        except OSError as error:
            self._failure = error
            return -1
        if not self.position:
            self._refusal = "a part of the file came where the whole was asked for"
            return -1
        match = _RANGE.fullmatch(self._headers.get("content-range", ""))
        same = self._headers.get("etag", self._etag) == self._etag
        if match and int(match[1]) == self.position and same:
            size = self.size if match[2] == "*" else int(match[2])
            if self.size in (None, size):
                self.size = size
                return None
        self._refusal = "the file has changed while it was fetched"
        return -1

    def _write(self, data: bytes) -> int | None:
        if self._status not in (200, 206):
            return -1
        if self.size is not None and self.position + len(data) > self.size:
            self._refusal = f"more came than the {self.size} bytes of the file"
            return -1
        try:
            self._target.write(data)
        except OSError as error:
            self._failure = error
            return -1
        self.position += len(data)
        return None

    def _start_over(self) -> None:
        self._target.seek(0)
        self._target.truncate()
        self.position, self.size, self._etag = 0, None, ""


def retry_after_s(value: str) -> float:
    """Seconds that a server asks to be left alone by a `Retry-After` (RFC 9110, §10.2.3): a number
    or a date; 0 if it is neither, or there is none."""
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
