"""What tasks a build will consist of, stage by stage, as each stage's own plan cuts its rows."""

from __future__ import annotations

import math

import numpy as np

from dataset_build import dedup, queries, screen
from dataset_build.forecast.sizes import Asked, input_bytes, reckon
from dataset_build.screen import duplicates, near
from pipeline.config import ConfigError, MissingInput
from pipeline.plan import Batch, Ledger, Work, kept_bytes
from pipeline.rates import Numbers
from pipeline.stage import Run

_LONG_S = 600
_RANGE = 1_000_000.0  # rows: what dedup and balance hold at most


class Workload:
    """The work of a build: `stages()`, and the numbers of rows that it follows from."""

    def __init__(self, run: Run, asked: Asked, ledger: Ledger, pilots: list[Run]) -> None:
        self.run = run
        self.asked = asked
        self.ledger = ledger
        self.pilots = pilots
        self.inputs, self.sizes = reckon(run, asked, ledger, pilots)
        self.facts: dict[str, float] = {}

    def stages(self) -> list[Work]:
        """The stages in their order, up to `until`."""
        made = [
            *(self._queries(), self._extract(), self._match(), self._dedup(), self._balance()),
            *(self._download(), self._screen(), self._pack()),
        ]
        names = [work.stage for work in made]
        return made[: names.index(getattr(self.run.config, "until", "pack")) + 1]

    def _queries(self) -> Work:
        batches, size = [], 0.0
        try:
            tasks = queries.plan(self.run)
        except (MissingInput, ConfigError):
            tasks = []
            self.ledger.note(
                "queries: its dumps are not there, so counting them is not reckoned in"
            )
        for step in ("wikipedia", "page_views"):
            mine = [input_bytes(self.run, task) for task in tasks if task.params["step"] == step]
            size += sum(mine)
            if mine:
                batches.append(Batch(f"queries.{step}", np.array(mine, np.float64)))
        last = Batch("queries.assemble", np.array([self.sizes.queries]))
        number = self.sizes.queries
        phases = (tuple(batches), (last,)) if batches else ((last,),)
        return Work("queries", "queries", number, number, phases, size)

    def _extract(self) -> Work:
        batches = [Batch(f"extract.{kind}", sizes) for kind, sizes in self.inputs.kinds.items()]
        out = self.sizes.candidates
        size = out * self.ledger.figure("candidate_bytes")
        read = self.inputs.bytes
        return Work("extract", "candidates", out, out, (tuple(batches),), read, data_bytes=size)

    def _rows_per_file(self) -> Numbers:
        """Candidates of each input file."""
        parts = [
            sizes * self.ledger.figure(f"extract.{kind}.rows_per_byte")
            for kind, sizes in self.inputs.kinds.items()
            if sizes.size
        ]
        rows = np.concatenate(parts)
        scaled: Numbers = rows * (self.sizes.candidates / rows.sum())
        return scaled

    def _match(self) -> Work:
        rows = self._rows_per_file()
        parts = np.maximum(1, np.ceil(rows / self.run.settings("match").rows_per_task))
        units = np.repeat(rows / parts, parts.astype(np.int64))
        made = Batch("match.matcher", np.array([self.sizes.queries]))
        # A row group for each bucket, in every file.
        more = self.run.settings("match").buckets - self._known_buckets()[0]
        matched = Batch(
            "match.match",
            units,
            more_s=max(0.0, more * self.ledger.figure("row_group.write_s")),
            more_bytes=max(0.0, more * self.ledger.figure("row_group.bytes")),
        )
        phases = ((made,), (matched,))
        read = self._extract().data_bytes
        return Work(*("match", "pairs", self.sizes.candidates, self.sizes.matched, phases, read))

    def _dedup(self) -> Work:
        groups, snapshots = len(dedup.groups(self.run)), self.sizes.snapshots
        pairs = self.sizes.matched * self.ledger.figure("dedup.snapshot_share")
        files = float(self._match().phases[1][0].units.size) / snapshots
        more_s = self._opening_s(files)
        if more_s > _LONG_S:
            self.ledger.note(
                f"dedup: a task opens {files:,.0f} files for each of its buckets, which takes "
                f"{more_s:,.0f} s; fewer match.buckets, fewer dedup.buckets_per_task or larger "
                "input files make it less"
            )
        units = np.full(groups * snapshots, pairs / groups / snapshots)
        first = Batch("dedup.snapshot", units, more_s=more_s, memory_up_to=_RANGE)
        merge = Batch(
            "dedup.merge", np.full(groups, self.sizes.matched / groups), memory_up_to=_RANGE
        )
        rows = self.sizes.matched / self.run.settings("match").buckets / snapshots
        if rows > dedup.MOST_ROWS:
            self.ledger.note(
                f"match.buckets: {rows:,.0f} rows of a snapshot in one bucket, above "
                f"{dedup.MOST_ROWS:,} memory grows with them; raise it to "
                f"{self._buckets(rows)}"
            )
        read = _kept(self._match(), self.ledger) + kept_bytes(first, self.ledger)
        return Work(
            *("dedup", "pairs", self.sizes.matched, self.sizes.unique, ((first,), (merge,)), read)
        )

    def _known_buckets(self) -> tuple[int, int, float]:
        """Buckets, buckets a task and files a snapshot of the tasks that were measured."""
        if not self.pilots:
            return 64, 16, 3.0
        run = self.pilots[-1]
        match, settings = run.settings("match"), run.settings("dedup")
        names = [task.task.params for task in run.plan("dedup")]
        snapshots = len({params["snapshot"] for params in names if "snapshot" in params})
        files = len(run.plan("match")) - 1
        return (
            match.buckets,
            min(settings.buckets_per_task, match.buckets),
            files / (snapshots or 1),
        )

    def _opening_s(self, files: float) -> float:
        """What reading the footers of all files takes a task, more than it took those measured.

        A file's footer names all its row groups, one a bucket, and is read twice a bucket.
        """
        each = self.ledger.figure("row_group.read_s")
        buckets: int = self.run.settings("match").buckets
        mine: int = min(self.run.settings("dedup").buckets_per_task, buckets)
        before, of_them, known_files = self._known_buckets()
        return max(0.0, 2 * each * (files * mine * buckets - known_files * of_them * before))

    def _buckets(self, rows: float) -> int:
        buckets: int = self.run.settings("match").buckets
        return min(65_536, buckets << max(0, math.ceil(math.log2(rows / dedup.MOST_ROWS))))

    def _balance(self) -> Work:
        files, pairs = len(dedup.groups(self.run)), self.sizes.unique
        counts = np.array([files * self.sizes.queries])
        each = np.full(files, pairs / files)
        sketch = () if self.run.settings("balance").mode == "metaclip" else ("balance.sketch",)
        phases = (
            (Batch("balance.total", counts),),
            *((Batch(kind, each, memory_up_to=_RANGE),) for kind in sketch),
            (Batch("balance.thresholds", np.array([self.sizes.entries]), memory_up_to=4 * _RANGE),),
            (Batch("balance.select", each, memory_up_to=_RANGE),),
            (Batch("balance.check", counts),),
        )
        passes = 1 + len(sketch)
        read = passes * kept_bytes(Batch("dedup.merge", each), self.ledger)
        return Work("balance", "pairs", pairs, self.sizes.selected, phases, read)

    def _download(self) -> Work:
        settings = self.run.settings("download")
        rows, asked = self.sizes.selected, self.asked
        tasks = max(1, math.ceil(rows / settings.pairs_per_task))
        workers = max(1, asked.connections // settings.threads) if asked.connections else None
        batch = Batch(
            "download.all", np.full(tasks, rows / tasks), self._network_s(), workers=workers
        )
        received = rows * self.ledger.figure("download.received_bytes")
        least_s = 0.0
        if asked.addresses_per_s:
            least_s = rows / self.ledger.given("addresses a second", asked.addresses_per_s, "given")
        self.facts["download: requests"] = rows * self.ledger.figure("download.requests")
        self.facts["download: received bytes"] = received
        selected, texts = self._balance(), Batch("dedup.snapshot", np.array([self.sizes.unique]))
        read = _kept(selected, self.ledger) + kept_bytes(texts, self.ledger)
        return Work(
            *("download", "pairs", rows, self.sizes.fetched, ((batch,),), read),
            data_bytes=self.sizes.fetched * self._picture_bytes(),
            least_s=least_s,
        )

    def _network_s(self) -> float:
        return self.ledger.figure("download.network_s")

    def _picture_bytes(self) -> float:
        """Of a stored picture; those of a pilot that stored another size, by the area."""
        side = self.run.settings("download").image_size
        known = self.ledger.figure("picture_bytes")
        measured = self.pilots[-1].settings("download").image_size if self.pilots else 256
        if side == measured:
            return known
        scaled = known * (side / measured) ** 2
        source = f"{measured} pixels gave {known:,.0f}; by the area for {side}"
        return self.ledger.given("picture_bytes at this size", scaled, source)

    def _screen(self) -> Work:
        settings = self.run.settings("screen")
        rows, pictures = self.sizes.selected, self.sizes.fetched
        phases: list[tuple[Batch, ...]] = []
        read = 3 * kept_bytes(Batch("download.all", np.array([rows])), self.ledger)
        if screen.compares(self.run) or settings.scores:
            if settings.evaluation:
                self.ledger.note("screen: what its evaluation sets take is not reckoned in")
            if settings.scores:
                self.ledger.note("screen: its score functions are not reckoned in")
            files = self._download().phases[0][0].units.size
            phases.append((Batch("screen.look", np.full(files, pictures / files)),))
            read += pictures * self._picture_bytes()
        if screen.compares(self.run):
            # It sorts a range of hashes; besides, each has a few bytes.
            held = near.KEYS_AT_ONCE // 4
            phases.append((Batch("screen.collect", np.array([pictures]), memory_up_to=held),))
        if settings.near_distance is not None:
            parts = near.slots_of_tasks(int(pictures))
            keys = np.array([len(part) / part[0][2] for part in parts]) * pictures
            # Of many ranges each looks at all pictures, most of which have no key in it.
            looked = max(len(part) for part in parts) * pictures if parts[0][0][2] > 1 else 0.0
            scan_s = looked * self.ledger.figure("screen.scan_s") if looked else 0.0
            held = near.KEYS_AT_ONCE // near.KEYS_A_PART
            phases.append((Batch("screen.near", keys, more_s=scan_s, memory_up_to=held),))
        passes = math.ceil(pictures / duplicates.ROWS_AT_ONCE)
        units = rows * (1 + (passes - 1) * self.ledger.figure("screen.pass_share"))
        if passes > 1:
            self.ledger.note(f"screen: its last task reads all digests {passes} times")
        decide = Batch("screen.decide", np.array([units]), memory_up_to=duplicates.ROWS_AT_ONCE)
        phases.append((decide,))
        return Work("screen", "pairs", pictures, self.sizes.pairs, tuple(phases), read)

    def _pack(self) -> Work:
        rows = self.sizes.pairs
        shards = max(1, math.ceil(rows / self.run.settings("pack").pairs_per_shard))
        pictures = rows * self._picture_bytes()
        phases = (
            (Batch("pack.shard", np.full(shards, rows / shards)),),
            (Batch("pack.gather", np.array([rows]), memory_up_to=_RANGE),),
        )
        fetched = kept_bytes(Batch("download.all", np.array([self.sizes.selected])), self.ledger)
        read = self.sizes.fetched * self._picture_bytes() + fetched
        return Work("pack", "pairs", rows, rows, phases, read, data_bytes=pictures)


def _kept(work: Work, ledger: Ledger) -> float:
    return sum(kept_bytes(batch, ledger) for phase in work.phases for batch in phase)
