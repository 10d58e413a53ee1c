"""The tables that the picture server reads: routes by host and path, and files of pictures."""

from __future__ import annotations

import io
import json
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from sample_web import dirt
from sample_web.pairs import Address

PER_FILE = 2000
"""Pictures in one `pictures-*.sqlite`."""

_SCHEMA = """
CREATE TABLE routes (
  host TEXT, path TEXT,
  kind TEXT,      -- sort of dirt; '' for a true picture
  action TEXT,    -- what the server does: picture, body, redirect, cut, short, drip, endless
  status INT,
  type TEXT,      -- Content-Type
  body INT,       -- picture number, or row of bodies
  headers TEXT,   -- more header lines
  location TEXT,  -- of a redirect; {port} stands for the server's port
  PRIMARY KEY (host, path)) WITHOUT ROWID;
CREATE TABLE bodies (number INTEGER PRIMARY KEY, body BLOB);
CREATE TABLE files (first INT, stop INT, name TEXT);
"""


class Route(NamedTuple):
    """One row of `routes`."""

    host: str
    path: str
    kind: str = ""
    action: str = "picture"
    status: int = 200
    type: str = "image/jpeg"
    body: int = 0
    headers: str = ""
    location: str = ""


def picture_files(count: int) -> list[tuple[int, int, str]]:
    """(first, stop, file name) of the files that hold pictures 0 to count."""
    starts = range(0, count, PER_FILE)
    return [(a, min(a + PER_FILE, count), f"pictures-{a // PER_FILE:05d}.sqlite") for a in starts]


def write_pictures(
    path: Path, first: int, stop: int, picture: Callable[[int], bytes], beat: Callable[[int], None]
) -> int:
    """Render pictures `first` to `stop` into one file; the number of their bytes."""
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE pictures (number INTEGER PRIMARY KEY, body BLOB)")
        size = 0
        for number in range(first, stop):
            body = picture(number)
            size += len(body)
            base.execute("INSERT INTO pictures VALUES (?, ?)", (number, body))
            beat(number - first)
    base.close()
    return size


def write_site(path: Path, routes: Iterable[Route], pictures: int) -> int:
    """Write `site.sqlite`; the number of routes. Two routes of one address are an error."""
    with sqlite3.connect(path) as base:
        base.executescript(_SCHEMA)
        base.executemany(
            "INSERT INTO bodies VALUES (?, ?)", enumerate(map(_bodies().__getitem__, _NAMES))
        )
        base.executemany("INSERT INTO files VALUES (?, ?, ?)", picture_files(pictures))
        base.executemany("INSERT INTO routes VALUES (?,?,?,?,?,?,?,?,?)", routes)
        (count,) = base.execute("SELECT count(*) FROM routes").fetchone()
    base.close()
    return int(count)


def robots(hosts: Iterable[str]) -> list[Route]:
    """`/robots.txt` of every site: one forbids everything, a third have none."""
    routes = []
    for position, host in enumerate(hosts):
        if position % 3 == 2:
            continue
        rules = "forbid" if host == dirt.ROBOTS_HOST else "allow"
        routes.append(_body(Address(host, "/robots.txt"), "robots.txt", rules, "text/plain"))
    return routes


def fault_routes(fault: dirt.Fault) -> list[Route]:
    """What the server does at a dirty address, and where it sends on to."""
    kind, address = fault.kind, fault.address
    if address is None:
        return []
    here = Route(address.host, address.path, kind)
    if fault.picture is not None:
        here = here._replace(body=fault.picture)
    simple = {"not_found": 404, "forbidden": 403, "server_error": (500, 503)[fault.detail % 2]}
    if kind in simple:
        status = simple[kind] if fault.detail % 9 or kind != "not_found" else 410
        return [_body(address, kind, "error", "text/html")._replace(status=status)]
    if kind == "redirect":
        return _chain(here, 1 + fault.detail % 3)
    if kind == "redirect_private":
        target = dirt.PRIVATE_TARGETS[fault.detail % len(dirt.PRIVATE_TARGETS)]
        target = target.replace("{name}", f"r{fault.number}")
        return [here._replace(action="redirect", status=302, location=target)]
    if kind == "redirect_loop":
        there = here._replace(path=f"/again{here.path}", kind="redirect_target")
        return [
            here._replace(action="redirect", status=301, location=there.path),
            there._replace(action="redirect", status=302, location=here.path),
        ]
    if kind == "redirect_file":
        targets = ("file:///etc/hostname", "ftp://files.example/x.jpg", "gopher://a.example/")
        return [here._replace(action="redirect", status=302, location=targets[fault.detail % 3])]
    if kind == "opt_out":
        line = _OPT_OUT[fault.detail % len(_OPT_OUT)]
        return [here._replace(headers=line)]
    if kind in ("html_as_picture", "placeholder", "pixel_bomb"):
        types = {"html_as_picture": "text/html; charset=utf-8", "pixel_bomb": "image/png"}
        return [_body(address, kind, kind, types.get(kind, "image/jpeg"))]
    if kind in ("svg", "tracking_pixel"):
        types = {"svg": "image/svg+xml", "tracking_pixel": "image/gif"}
        return [_body(address, kind, kind, types[kind])]
    actions = {"short_body": "short", "cut_picture": "cut", "slow": "drip", "endless": "endless"}
    return [here._replace(action=actions.get(kind, "picture"), location=str(fault.detail % 2))]


_OPT_OUT = (
    "X-Robots-Tag: noai",
    "X-Robots-Tag: noai, noimageai",
    "X-Robots-Tag: noindex, noimageai",
    "tdm-reservation: 1",
)


def _chain(here: Route, hops: int) -> list[Route]:
    """A redirect that ends well after some hops, relative and absolute."""
    routes = []
    picture = here
    for hop in range(hops):
        path = f"/moved{hop}{picture.path}"
        location = path if hop % 2 else f"http://{here.host}{path}"
        status = (301, 302, 307)[hop % 3]
        routes.append(picture._replace(action="redirect", status=status, location=location))
        picture = picture._replace(path=path, kind="redirect_target")
    return [*routes, picture]


def _body(address: Address, kind: str, body: str, content_type: str) -> Route:
    number = _NAMES.index(body)
    return Route(address.host, address.path, kind, "body", 200, content_type, number)


def _placeholder() -> bytes:
    picture = Image.new("RGB", (240, 180), (236, 236, 236))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 50, 180, 130), outline=(170, 170, 170), width=3)
    draw.line((60, 130, 105, 85, 130, 110, 150, 95, 180, 130), fill=(170, 170, 170), width=3)
    draw.text((72, 140), "picture not available", fill=(120, 120, 120))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _pixel_bomb(side: int = 12_000) -> bytes:
    """A whole PNG of side x side grey pixels, 1 bit each: 18 MB of zeros in about 18 kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


_PAGE = "<!doctype html><title>{0}</title><h1>{0}</h1><p>The picture you look for is not here.</p>"
_NAMES = (
    "error",
    "html_as_picture",
    "placeholder",
    "pixel_bomb",
    "svg",
    "tracking_pixel",
    "allow",
    "forbid",
)


def _bodies() -> dict[str, bytes]:
    return {
        "error": _PAGE.format("Error").encode(),
        "html_as_picture": _PAGE.format("Please sign in").encode() * 20,
        "placeholder": _placeholder(),
        "pixel_bomb": _pixel_bomb(),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64">'
        b'<circle cx="32" cy="32" r="30" fill="red"/></svg>',
        "tracking_pixel": bytes.fromhex(
            "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"
        ),
        "allow": b"User-agent: *\nAllow: /\n",
        "forbid": b"User-agent: *\nDisallow: /\n",
    }


def dirt_json(numbers: dict[str, int]) -> str:
    """The text of `dirt.json`."""
    return json.dumps(numbers, indent=1, sort_keys=True) + "\n"
