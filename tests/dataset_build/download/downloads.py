"""One run folder that is downloaded into again and again, and pairs to select for it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_build import download
from dataset_build.download import DownloadSettings
from dataset_build.lists import ListsSettings
from pipeline.stage import Run
from pipeline.stats import Stats
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of
from tests.dataset_build.inline import InlineExecutor

from .conftest import HostileWeb, picture


class Downloads:
    """One run folder, downloaded into again and again."""

    def __init__(self, folder: Path, web: HostileWeb, inline: InlineExecutor) -> None:
        self.folder, self._web, self._inline = folder, web, inline
        self.run = Run(folder, Config())

    def __call__(
        self,
        selected: list[Pair],
        known: list[Pair] | None = None,
        lists: ListsSettings | None = None,
        **settings: Any,
    ) -> list[str]:
        """Select these pairs (of those that `known` has texts of); what the server was asked."""
        usual = {"timeout_s": 5.0, "polite_connections": 8, "pairs_per_task": 8}
        usual |= {"robots": "ignore", "requests_per_s": None, "allow_networks": ("127.0.0.0/8",)}
        config = Config(
            download=DownloadSettings(**{**usual, **settings}), lists=lists or ListsSettings()
        )
        self.run = Run(self.folder, config)
        self._web.hits.clear()
        stages = [dedup_of(known or selected), balance_of(selected), download.STAGE]
        self._inline.advance(self.run, stages)
        rows = self.rows()
        assert [row["uid"] for row in rows] == sorted(pair.uid for pair in selected)
        for row, pair in zip(rows, sorted(selected, key=lambda pair: pair.uid), strict=True):
            assert (row["url"], row["text"], row["snapshot"]) == pair
            assert (row["page_url"], row["file"]) == (
                f"http://page.example/{pair.snapshot}",
                f"file of {pair.snapshot}",
            )
        return sorted(self._web.hits)

    def rows(self, kind: str = "fetched") -> list[dict[str, Any]]:
        paths = [self.run.path(r) for r in self.run.find(f"download:{kind}-*")]
        return list(pa.concat_tables([pq.read_table(path) for path in paths]).to_pylist())

    @property
    def outcomes(self) -> dict[bytes, dict[str, Any]]:
        """By address, but for the file that the record is from: it may be written anew."""
        rows = {row["uid"][:8]: row for row in self.rows()}
        for row in rows.values():
            del row["texts"]
        return rows

    @property
    def stats(self) -> Stats:
        return sum((m.stats for m in self.run.manifests("download")), Stats())

    def tars(self) -> dict[str, tuple[int, dict[str, bytes]]]:
        """Of each tar that is published: its inode, and what it holds."""
        return {path.name: (path.stat().st_ino, dict(_members(path))) for path in self._tars()}

    def _tars(self) -> list[Path]:
        return [self.run.path(reference) for reference in self.run.find("download:staged-*")]

    def check_pictures(self) -> None:
        """Every outcome names a tar of its own task, and that holds what the server serves."""
        for task in self.run.manifests("download"):
            store = self.folder / "download" / "store" / task.store
            names = [output.name for output in task.outputs]
            for fetched in (name for name in names if name.endswith(".parquet")):
                for row in pq.read_table(store / fetched).to_pylist():
                    assert (row["staged"] in names) == (row["status"] == "ok")
                    if row["status"] == "ok":
                        data = dict(_members(store / row["staged"]))[f"{row['uid'][:8].hex()}.jpg"]
                        assert _alike(data, picture(int(row["url"].rpartition("/")[2])))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def _alike(stored: bytes, served: bytes) -> bool:
    """The same noise, encoded twice."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)), np.float64) for data in (stored, served))
    return a.shape == b.shape and float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) > 0.9


def pictures(*numbers: int, snapshot: str = "A") -> list[Pair]:
    return [Pair(f"http://a.example/picture/{i}", "x", snapshot) for i in numbers]


def failing(*numbers: int) -> list[Pair]:
    return [Pair(f"http://a.example/status/404?{i}") for i in numbers]


def asked(pairs: list[Pair]) -> list[str]:
    return sorted(pair.url.removeprefix("http://a.example") for pair in pairs)


def timeless(outcomes: dict[bytes, Any]) -> dict[bytes, Any]:
    """Outcomes but for when they came to be, and where the pictures lie."""
    varying = {"fetched", "staged", "staged_offset"}
    return {
        uid: {name: value for name, value in row.items() if name not in varying}
        for uid, row in outcomes.items()
    }
