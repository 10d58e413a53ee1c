"""One download task: a range of uids becomes `staged-*.tar` and one outcome per pair.

An address that several pairs share is fetched once, and its picture staged once. What img2dataset
says it wrote is not believed: the tar is read back and compared with what was handed to it, picture
by picture.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dataset_build import records, removed, uid_range
from dataset_build.download import LISTED, STAGE, DownloadSettings, expected, pairs, pictures
from dataset_build.download.earlier import MARK, Earlier, metadata
from dataset_build.download.journal import Journal, Unfinished, share
from dataset_build.download.outcome import NO_OUTCOME, count
from dataset_build.lists import Lists
from dataset_build.removed import Tombstones
from pipeline.manifest import Damaged
from pipeline.stage import Attempt
from pipeline.stats import Stats


def fetch_shard(attempt: Attempt) -> Stats:
    """Fetch, resize, stage and verify the task's pairs. Raises `Stopped` if asked to stop."""
    settings: DownloadSettings = attempt.settings
    part, parts = attempt.task.params["part"], attempt.task.params["parts"]
    first, last = uid_range.bounds(part, parts)
    named = [attempt.run.identity(name) for name in expected(attempt.run)]
    if settings.blur:
        named.append(attempt.task.params["blur"])
    marks = metadata(settings, STAGE.version, named)
    earlier = Earlier(attempt, first, last, marks)
    lists, tombstones = Lists.of(attempt), Tombstones(attempt.run.folder)
    selected = pairs.selected(attempt, earlier, first, last)
    gone = set()
    for pair in selected:
        known = earlier.by_uid.get(pair["uid"]) or earlier.by_address.get(pair["uid"][:8])
        if tombstones.cover(pair, known):
            gone.add(pair["uid"])
            if known and known["staged"] in earlier.tars:
                earlier.keep(known["staged"])  # else nobody finds the picture that is in it
        elif known and not _is_as_listed(known, lists):
            earlier.forget(pair["uid"])
    addresses: dict[bytes, pictures.Address] = {}
    for pair in selected:
        if pair["uid"] not in gone and pair["uid"][:8] not in earlier.by_address:
            addresses.setdefault(pair["uid"][:8], pair)
    stats = Stats(rows_in=len(selected))
    outcomes = _fetch_all(attempt, addresses, marks, lists, tombstones, stats)

    fetched = []
    for pair in selected:
        address = pair["uid"][:8]
        if pair["uid"] in gone:
            row = {**NO_OUTCOME, **earlier.by_uid.get(pair["uid"], {}), **pair}
            fetched.append(removed.redacted(row, records.FETCHED.names))
            if any(fetched[-1]["staged_sha256"]):
                stats.rows_out += 1  # `screen` goes on to number it, and drops it
            else:
                stats.drop(removed.STATUS)
            continue
        known = earlier.by_uid.get(pair["uid"]) or earlier.by_address.get(address)
        stats.counts["pairs_known"] += known is not None
        row = known or outcomes[address]
        if pair["url"] != row["url"]:  # 1 pair in 10⁹, among 10¹⁰
            row = {**NO_OUTCOME, "status": "fetch_failed", "error": "the hash is taken"}
        row = {**row, **{name: pair[name] for name in (*records.TEXTS.names, "texts")}}
        if row["status"] == removed.STATUS:  # as its file showed
            row = removed.redacted(row, records.FETCHED.names)
        fetched.append(row)
        if row["status"] == "ok":
            stats.rows_out += 1
        else:
            stats.drop(row["status"])
    assert len({row["uid"] for row in fetched}) == stats.rows_in, "an outcome for every pair"
    wanted = {pair["uid"] for pair in selected}
    unused = [row for uid, row in sorted(earlier.by_uid.items()) if uid not in wanted]
    for row in (*fetched, *unused):
        if row["staged"] in earlier.tars:
            earlier.keep(row["staged"])
    digits = max(5, len(str(parts)))
    name = f"{part:0{digits}d}-of-{parts:0{digits}d}.parquet"
    for kind, rows in (("fetched", fetched), ("unused", unused)):
        if rows or kind == "fetched":
            table = pa.Table.from_pylist(rows, schema=records.FETCHED.with_metadata(marks))
            path = attempt.folder / f"{kind}-{name}"
            pq.write_table(table, path, compression="zstd", row_group_size=1 << 16)
    return stats


def _is_as_listed(known: dict[str, Any], lists: Lists) -> bool:
    """Whether an outcome is what the lists say by now; an address that leads to a listed one is
    as good as listed."""
    if not lists:
        return known["status"] not in LISTED
    reason = lists.reason_of_address(known["url"]) or lists.reason_of_address(known["final_url"])
    return reason == (known["status"] if known["status"] in LISTED else "")


def _fetch_all(
    attempt: Attempt,
    addresses: dict[bytes, pictures.Address],
    marks: dict[bytes, bytes],
    lists: Lists,
    tombstones: Tombstones,
    stats: Stats,
) -> dict[bytes, dict[str, Any]]:
    """Fetch addresses into one tar; what became of each."""
    if not addresses:
        return {}
    # Another list of addresses is another tar, so earlier ones can stand beside it.
    key = xxhash.xxh3_64_hexdigest(b"".join(sorted(addresses)))
    settings: DownloadSettings = attempt.settings
    path = attempt.folder / f"staged-{attempt.task.params['part']:05d}-{key}.tar"
    mark = marks[MARK].decode()[:16]
    with Unfinished(attempt, mark, addresses) as unfinished, Journal(path) as journal:
        share(attempt, path, mark)
        ended = {
            address: known
            for address, known in unfinished.outcomes.items()
            if _is_as_listed(known, lists)
            and not settings.asks_again(known["status"], known["fetched"])
            and not tombstones.cover_file(known["sha256"], known["final_url"])
        }
        left = {a: pair for a, pair in addresses.items() if a not in ended}
        stats.counts["addresses_resumed"] = len(addresses) - len(left)
        if left:
            pictures.stage(attempt, left, journal, lists, tombstones, len(addresses))
        attempt.stop.check()
        for address, known in ended.items():
            journal.end(address, known, unfinished.picture(address))
    outcomes = {}
    for address, (known, offset) in journal.verified().items():
        count(stats, known)
        staged = {"staged": path.name, "staged_offset": offset} if known["status"] == "ok" else {}
        outcomes[address] = {**NO_OUTCOME, **known, **staged}
    if outcomes.keys() != addresses.keys():
        raise Damaged(f"{path}: {len(outcomes)} of {len(addresses)} addresses have an outcome")
    return outcomes
