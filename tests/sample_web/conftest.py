"""A small sample web, built once, and its server."""

from __future__ import annotations

import http.client
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline import manifest
from pipeline.config import Settings
from pipeline.stage import Attempt, Run
from pipeline.stats import Stats
from pipeline.stop import StopFlag
from sample_web import scenes
from sample_web.stage import STAGE, SampleWebSettings, serve


class Root(Settings):
    """A configuration with nothing but a sample web."""

    sample_web: SampleWebSettings = SampleWebSettings()


def _build(folder: Path, settings: SampleWebSettings) -> Run:
    run = Run(folder, Root(sample_web=settings))
    planned = STAGE.planned(run, 0, 0)
    run.save_plan("sample_web", planned)
    stage_folder = run.stage_folder("sample_web")
    for one in planned:
        attempt = stage_folder / "store" / f"attempt{one.task.index}"
        attempt.mkdir(parents=True)
        stats: Stats = STAGE.work(Attempt(run, one.task, attempt, StopFlag()))
        manifest.publish(
            stage_folder,
            attempt,
            index=one.task.index,
            fingerprint=one.fingerprint,
            stats=stats,
            seconds=0,
            attempt=0,
        )
    return run


@dataclass(frozen=True)
class Web:
    """A built sample web."""

    run: Run
    settings: SampleWebSettings

    @property
    def out(self) -> Path:
        return self.run.stage_folder("sample_web") / "out"

    def routes(self) -> list[tuple[str, str, str]]:
        """(host, path, kind) of everything the server knows."""
        base = sqlite3.connect(self.out / "site.sqlite")
        rows = base.execute("SELECT host, path, kind FROM routes ORDER BY host, path").fetchall()
        base.close()
        return rows


@dataclass(frozen=True)
class Server:
    """A running server of a sample web."""

    web: Web
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)

    def get(self, host: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self.connect()
        connection.request("GET", quote(path, safe="/?=&"), headers={"Host": host})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body

    def addresses(self, kind: str) -> list[tuple[str, str]]:
        return [(host, path) for host, path, found in self.web.routes() if found == kind]


@pytest.fixture(scope="session")
def build() -> Callable[[Path, SampleWebSettings], Run]:
    return _build


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    settings = SampleWebSettings(
        pairs=240, dirt=1.0, articles=150, hours=2, evaluation_per_class=1, unseen_per_class=2
    )
    return Web(_build(tmp_path_factory.mktemp("web"), settings), settings)


@pytest.fixture(scope="session")
def server(web: Web) -> Iterator[Server]:
    with serve(web.run) as environment:
        suffix, _, address = environment["OPENWIT_CONNECT_TO"].partition("=")
        assert suffix == ".example"
        yield Server(web, int(address.removeprefix("127.0.0.1:")))


@pytest.fixture(scope="session")
def named() -> Callable[[str], set[tuple[str, str]]]:
    """The (shape, colour) combinations that an English text names."""
    colours, shapes = "|".join(scenes.COLOURS), "|".join(scenes.SHAPES)
    adjective = "|".join(scenes.PATTERNS)
    pattern = re.compile(rf"\b({colours})\s+(?:(?:{adjective})\s+)?({shapes})s?\b")

    def find(text: str) -> set[tuple[str, str]]:
        plain = re.sub(r"[\W_]+", " ", text.lower())
        return {(shape, colour) for colour, shape in pattern.findall(plain)}

    return find
