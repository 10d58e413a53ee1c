"""A build of a few pictures from a web on loopback, whose shards are known once it went well.

For measurements that disturb it. Its processes are forked from this one, which has everything
loaded, so that hundreds of them take minutes.
"""

from __future__ import annotations

import os
import tarfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataset_build import download, pack, screen
from dataset_build.download import DownloadSettings
from dataset_build.pack import PackSettings
from pipeline import damage, manifest, runner
from pipeline.files import sha256
from pipeline.stage import Attempt, Planned, Run, Stage
from pipeline.stats import Stats
from pipeline.stop import StopFlag
from tests.dataset_build.download.conftest import HostileWeb
from tests.dataset_build.hand_made import Config, Pair, balance_of, dedup_of, queries_of
from tests.dataset_build.inline import InlineExecutor

COMPARED = ("pack/out/shards/*.tar", "pack/out/index.parquet", "pack/out/dataset.json")
BUILT = ("download", "screen", "pack")


def load() -> None:
    """Import what a download needs, once for all that are forked."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dataset_build.download import staging  # noqa: F401


class SmallBuild:
    """A configuration and its stages: `addresses` pictures, each fourth one not there."""

    def __init__(
        self, web: HostileWeb, addresses: int, wait_s: float = 0.0, tasks: int = 3
    ) -> None:
        os.environ["OPENWIT_CONNECT_TO"] = web.connect_to
        self.web = web
        urls = [
            f"http://a{i % 5}.example/" + (f"picture/{i}?wait={wait_s}" if i % 4 else f"none/{i}")
            for i in range(addresses)
        ]
        self.pairs = [
            Pair(url, text) for url in urls for text in ("one", "two")[: 1 + len(url) % 2]
        ]
        per_task = -(-len(self.pairs) // tasks)
        self.config = Config(
            download=DownloadSettings(
                pairs_per_task=per_task,
                threads=4,
                polite_connections=4,
                requests_per_s=None,
                robots="ignore",
                allow_networks=("127.0.0.0/8",),
            ),
            pack=PackSettings(pairs_per_shard=10),
        )

    @property
    def stages(self) -> list[Stage]:
        """From pairs that are made up to shards."""
        honest = balance_of(self.pairs)

        def work(attempt: Attempt) -> Stats:
            np.save(attempt.folder / "counts.npy", np.array([len(self.pairs)], np.uint64))
            return honest.work(attempt)

        balance = Stage("balance", (), honest.plan, work)
        made_up = [queries_of(), dedup_of(self.pairs), balance]
        return [*made_up, download.STAGE, screen.STAGE, pack.STAGE]

    def build(self, folder: Path, last: int | None = None) -> None:
        """Bring a run up to date, in this process; as far as stage number `last`."""
        InlineExecutor().advance(Run(folder, self.config), self.stages[:last])

    def asked(self) -> Counter[bytes]:
        """How often each address was asked for."""
        known = {pair.url.partition(".example")[2]: pair.uid[:8] for pair in self.pairs}
        return Counter(known[hit] for hit in self.web.hits if hit in known)

    def planned(self, folder: Path) -> list[Planned]:
        """The tasks of `download`."""
        return download.STAGE.planned(Run(folder, self.config), 0, 0)

    def work_on(self, folder: Path, planned: Planned) -> None:
        """One attempt at one of them, in this process."""
        runner.work_on(Run(folder, self.config), download.STAGE, planned, 1, StopFlag())


def fork(work: Callable[[], object]) -> int:
    """A process that does `work` and ends with 0, or with 1 and a traceback."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """Wait for a process; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(run: Path, patterns: Sequence[str] = COMPARED) -> dict[str, str]:
    """SHA-256 of what must not depend on how a run was disturbed."""
    paths = [path for pattern in patterns for path in sorted(run.glob(pattern))]
    return {path.relative_to(run).as_posix(): sha256(path) for path in paths}


def faults(run: Path) -> list[str]:
    """What is damaged of all that is published, and names below `out/` that no manifest knows."""
    found = []
    for stage in BUILT:
        folder = run / stage
        published = manifest.everything(folder) if (folder / "done").exists() else []
        for one in published:
            manifest.expose(folder, one)
            found += damage.damage(folder, one)
        known = {output.name for one in published for output in one.outputs}
        names = {p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*.*")}
        found += [f"{stage}: {name} is not published" for name in sorted(names - known)]
    return found


def journalled(run: Path) -> set[bytes]:
    """The addresses whose outcomes unpublished tars hold, read by Python's own tar reader."""
    found = set()
    for path in run.glob("download/partial/*/*.tar"):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None or len(content.read()) < member.size:
                        break
                    if member.name.endswith(".json"):
                        found.add(bytes.fromhex(member.name.partition(".")[0]))
        except tarfile.TarError:
            pass  # torn, or empty
    return found


def published(run: Path) -> set[bytes]:
    """The addresses whose outcomes are published."""
    found = set()
    folder = run / "download"
    for one in manifest.everything(folder) if (folder / "done").exists() else []:
        for path in (folder / "store" / one.store).glob("fetched-*.parquet"):
            found |= {uid[:8] for uid in pq.read_table(path, columns=["uid"])["uid"].to_pylist()}
    return found
