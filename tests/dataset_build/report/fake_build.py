"""Run folders made by hand: what each stage would have published, as far as a test wants it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from dataset_build import records
from dataset_build.balance.phases import HEAD_DOMAINS
from pipeline import files, manifest
from pipeline.config import Settings
from pipeline.stage import Planned, Run, Stage, Task
from pipeline.stats import Stats

NAMES = (
    *("queries", "extract", "match", "dedup", "balance", "download", "screen", "pack"),
    *("train", "evaluate"),
)
HOSTILE = (
    '"><script>document.title="owned"</script><img src=http://198.51.100.9/x onerror=alert(1)>'
)


class BalanceSettings(Settings):
    """As far as the report reads it."""

    cap: int = 40
    mode: str = "quota"
    spare: float = 0.0
    domain_share: float | None = None


class Config(Settings):
    """A configuration with the one section that the report looks at."""

    balance: BalanceSettings = BalanceSettings()


def _never(*_: Any) -> Any:
    raise AssertionError("a report runs nothing")


STAGES = [Stage(name, (), _never, _never, unit="pairs") for name in NAMES]


class FakeBuild:
    """Publishes consistent outputs, stage by stage."""

    def __init__(
        self,
        folder: Path,
        *,
        queries: int = 120,
        picture: int = 48,
        balance: BalanceSettings | None = None,
    ) -> None:
        self.run = Run(folder, Config(balance=balance or BalanceSettings()))
        self.cut_off = 34  # titles, by the limit
        self.delta: tuple[int, int] | None = (17, 5)  # pairs that came and that went
        self.screened: dict[str, dict[str, int]] = {
            "evaluation_set:imagenet": {"pictures": 90, "undecodable": 2},
            "evaluation_set:cifar": {"pictures": 10},
            "evaluation:imagenet": {"exact": 5, "0+": 4, "8+": 3, "24+": 0},
            "list:blocked": {"address": 2, "picture": 1},
            "score:faces": {"0.2": 7, "0": 90, "0.03": 9},
        }
        self.domain = "photos-{}.example"
        self.random = np.random.default_rng(7)
        self.queries = queries
        self.picture = picture
        self.captions: tuple[str, ...] = ()
        ranks = np.arange(1, queries + 1)
        self.counts = (500 / ranks**1.1).astype(np.uint64)
        self.counts[ranks > queries * 0.9] = 0
        self.raw = self.counts * 3 // 2
        capped = np.minimum(self.counts, 40).astype(np.int64)
        # Pairs in the order of their uids: the query that selected each, and all that it contains.
        self.selected = self.random.permutation(np.repeat(np.arange(queries), capped)).tolist()
        self.selected_count = len(self.selected)
        self.contained = [
            sorted({query} if i % 7 else {query, 0}) for i, query in enumerate(self.selected)
        ]
        self.fetched = int(self.selected_count * 0.7)
        self.kept = self.fetched - self.fetched // 10

    def publish(
        self,
        stage: str,
        write: Callable[[Path], None] = lambda folder: None,
        stats: Stats | None = None,
        *,
        index: int = 0,
        planned: int = 1,
    ) -> None:
        """Publish one task of a stage that has `planned` tasks."""
        tasks = [Planned(Task(stage, i), manifest.digest([stage, i])) for i in range(planned)]
        self.run.save_plan(stage, tasks)
        folder = self.run.stage_folder(stage)
        private = folder / "store" / files.attempt_name()
        private.mkdir(parents=True)
        write(private)
        manifest.publish(
            folder,
            private,
            index=index,
            fingerprint=tasks[index].fingerprint,
            stats=stats or Stats(),
            seconds=12.5,
            attempt=0,
        )

    def through(self, last: str) -> FakeBuild:
        """Publish every stage up to `last`."""
        for name in NAMES[: NAMES.index(last) + 1]:
            getattr(self, f"make_{name}")()
        return self

    def make_queries(self) -> None:
        sources = [["word"], ["bigram"], ["title", "word"], ["wordnet"]]
        rows = [
            {"query_id": q, "text": f"query {q}", "norm": f"query {q}", "sources": sources[q % 4]}
            for q in range(self.queries)
        ]
        table = pa.Table.from_pylist(rows, schema=records.QUERIES)
        stats = Stats(
            self.queries + 1234, self.queries, Counter(below_min_count=1200, over_limit=34)
        )
        if self.cut_off:
            stats.observe("cut_off", "title", self.cut_off)
        self.publish("queries", lambda f: pq.write_table(table, f / "queries.parquet"), stats)

    def make_extract(self) -> None:
        lost = Counter(no_alt=700_001, too_short=90_002, boilerplate=9_003)
        for index in (0, 1):
            stats = _stats(60_000, lost)
            stats.warnings = {self.domain + "/cut.warc.gz": "cut off"} if index else {}
            self.publish("extract", stats=stats, index=index, planned=2)

    def make_match(self) -> None:
        stats = _stats(41_007, Counter(no_query=120_000 - 41_007))
        stats.counts["matches"] = 98_765
        for n in (1, 2, 10, 3):
            stats.observe("queries_a_text", n, 7 * n)
        self.publish("match", stats=stats)

    def make_dedup(self) -> None:
        self.publish("dedup", stats=_stats(40_000, Counter(same_address=1_007)))

    def make_balance(self) -> None:
        n = self.selected_count
        stats = _stats(n, Counter(over_cap=40_000 - n))
        if self.delta:
            stats.counts["came"], stats.counts["went"] = self.delta
        self.publish("balance", self.write_balance, stats)

    def write_balance(self, folder: Path) -> None:
        """The files of a whole selection."""
        np.save(folder / "counts.npy", self.counts)
        np.save(folder / "tau.npy", self.counts)
        selected = self.tally(self.selected)
        columns = {
            "query_id": np.arange(self.queries, dtype=np.uint32),
            "raw": self.raw,
            "count": self.counts,
            "charged": self.counts,
            "selected": selected,
            "in_union": self.tally(itertools.chain(*self.contained)),
        }
        pq.write_table(pa.table(columns), folder / "coverage.parquet")
        half = self.selected_count // 2
        for part, these in enumerate((slice(half), slice(half, None))):
            table = {
                "uid": pa.array([_uid(i) for i in range(self.selected_count)][these], records.UID),
                "query_ids": pa.array(self.contained[these], pa.list_(pa.uint32())),
                "selected_by": pa.array([[q] for q in self.selected[these]], pa.list_(pa.uint32())),
            }
            pq.write_table(pa.table(table), folder / f"selected-{part:05d}.parquet")
        # Half of what a query selected from one domain, half of the rest from the next, and so on.
        domains = [
            (q, self.domain.format(q % 5 + place), n >> place)
            for q, n in enumerate(selected[:100].tolist())
            for place in range(1, 11)
            if n >> place
        ]
        rows = [dict(zip(HEAD_DOMAINS.names, row, strict=True)) for row in domains]
        pq.write_table(pa.Table.from_pylist(rows, HEAD_DOMAINS), folder / "domains.parquet")
        if self.delta:
            came, went = self.delta
            uids = pa.array([_uid(i) for i in range(came + went)], records.UID)
            delta = {"uid": uids, "came": [True] * came + [False] * went}
            pq.write_table(pa.table(delta), folder / "delta-00000.parquet")

    def tally(self, queries: Iterable[int]) -> npt.NDArray[np.uint64]:
        """How often each query occurs."""
        return np.bincount(list(queries), minlength=self.queries).astype(np.uint64)

    def make_download(self) -> None:
        reasons = ["not_found", "timed_out", "not_an_image", "robots", "too_small"]
        failed = self.selected_count - self.fetched
        status = ["ok"] * self.fetched + [reasons[i * i % 5] for i in range(failed)]
        sides = self.random.integers(90, 1900, (2, self.selected_count)).astype(np.uint16)
        table = pa.table(
            {
                "status": status,
                "http_status": pa.array(
                    [200] * self.fetched + [404 - 4 * (i % 2) for i in range(failed)], pa.uint16()
                ),
                "original_width": sides[0],
                "original_height": sides[1],
            }
        )
        dropped = Counter(status[self.fetched :])
        stats = _stats(self.fetched, dropped)
        stats.counts["bytes_received"] = 123_456_789

        def write(folder: Path) -> None:
            pq.write_table(table, folder / "fetched-00000.parquet")
            _write_tar(folder / "staged-00000.tar", {"a": b"x" * 5000})

        self.publish("download", write, stats)

    def make_screen(self) -> None:
        lost = self.fetched - self.kept
        half = lost // 2
        stats = _stats(self.kept, Counter(near_duplicate=half, evaluation=lost - half))
        stats.counts["captions_merged"] = 3
        for histogram, bins in self.screened.items():
            stats.histograms[histogram] = Counter(bins)
        downloaded = self.tally(self.selected[: self.fetched])
        self.publish("screen", lambda f: np.save(f / "downloaded.npy", downloaded), stats)

    def make_pack(self) -> None:
        self.publish("pack", self._write_pack, _stats(self.kept, Counter()))

    def _write_pack(self, folder: Path) -> None:
        (folder / "shards").mkdir()
        rows: list[dict[str, Any]] = []
        shards = []
        size = -(-self.kept // 3)
        for shard in range(3):
            name = f"{shard:05d}.tar"
            members: dict[str, bytes] = {}
            some: list[dict[str, Any]] = []
            for sample in range(shard * size, min(self.kept, (shard + 1) * size)):
                uid = _uid(sample)
                query = self.selected[sample]
                caption = f"a picture of query {query} number {sample}"
                if sample < len(self.captions):
                    caption = self.captions[sample]
                members[f"{uid.hex()}.jpg"] = _picture(query, self.picture)
                members[f"{uid.hex()}.txt"] = caption.encode()
                members[f"{uid.hex()}.json"] = b"{}"
                row: dict[str, Any] = {
                    "uid": uid,
                    "shard": name,
                    "query_ids": self.contained[sample],
                    "selected_by": [query],
                }
                some.append(row)
            places = _write_tar(folder / "shards" / name, members)
            for row in some:
                uid = row["uid"].hex()
                row["image_offset"], row["image_bytes"] = places[f"{uid}.jpg"]
                row["text_offset"], row["text_bytes"] = places[f"{uid}.txt"]
                row["width"], row["height"] = self.picture, self.picture * 3 // 4
            rows += some
            data = (folder / "shards" / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append(
                {"name": name, "bytes": len(data), "sha256": digest, "samples": len(some)}
            )
        table = pa.Table.from_pylist(rows, schema=records.INDEX)
        pq.write_table(table, folder / "index.parquet", row_group_size=64)
        described = {"fingerprint": "f00d" * 16, "samples": len(rows), "pairs_by_shard": shards}
        (folder / "dataset.json").write_text(json.dumps(described))

    def make_train(self) -> None:
        folder = self.run.stage_folder("train")
        self.publish("train", stats=_stats(64_000, Counter()))
        noise = self.random.normal(0, 0.08, 900)
        lines = [
            json.dumps(
                {
                    "step": step,
                    "loss": 1.1 + 3.0 * float(np.exp(-step / 220)) + noise[step - 1],
                    "accuracy": 0.75 * (1 - float(np.exp(-step / 260))) + abs(noise[step - 1]) / 4,
                    "learning_rate": 5e-4,
                }
            )
            for step in range(1, 901)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 901, "lo')

    def make_evaluate(self) -> None:
        self.publish("evaluate", stats=_stats(1200, Counter()))
        results = {
            "sample_web": {"top1": 0.7125, "top5": 0.951, "classes": 48, "images": 960},
            "sample_web_unseen": {"top1": 0.4021, "top5": 0.803, "classes": 12, "images": 240},
        }
        path = self.run.stage_folder("evaluate") / "evaluation.json"
        path.write_text(json.dumps(results))


def _uid(number: int) -> bytes:
    return number.to_bytes(4, "big") + bytes(12)


def _stats(rows_out: int, dropped: Counter[str]) -> Stats:
    return Stats(rows_out + dropped.total(), rows_out, dropped.copy())


def _write_tar(path: Path, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
    """Write members; where each one's bytes begin, and how many they are."""
    places = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            places[name] = (tar.offset + 512, len(data))
            tar.addfile(member, io.BytesIO(data))
    return places


@cache
def _picture(sample: int, side: int) -> bytes:
    hue = sample * 47 % 255
    picture = Image.new("HSV", (side, side * 3 // 4), (hue, 60, 215))
    draw = ImageDraw.Draw(picture)
    edge = side // 6
    shape = draw.ellipse if sample % 2 else draw.rectangle
    shape((edge, edge, side - edge, side * 3 // 4 - edge), fill=((hue + 128) % 255, 150, 170))
    target = io.BytesIO()
    picture.convert("RGB").save(target, "JPEG", quality=85)
    return target.getvalue()
