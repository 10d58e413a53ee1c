from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_build import records, uid_range

UIDS = st.binary(min_size=16, max_size=16)


@given(UIDS, st.integers(1, 5000))
def test_every_uid_is_in_just_one_part(uid: bytes, parts: int) -> None:
    part = int.from_bytes(uid, "big") * parts >> 128
    holders = []
    for near in range(max(0, part - 1), min(parts, part + 2)):
        first, last = uid_range.bounds(near, parts)
        if first <= uid <= last:
            holders.append(near)
    assert holders == [part]


def test_the_parts_cover_everything() -> None:
    assert uid_range.bounds(0, 7)[0] == bytes(16)
    assert uid_range.bounds(6, 7)[1] == b"\xff" * 16
    for part in range(6):
        last, first = uid_range.bounds(part, 7)[1], uid_range.bounds(part + 1, 7)[0]
        assert int.from_bytes(last, "big") + 1 == int.from_bytes(first, "big")


@pytest.mark.parametrize("in_order", [True, False])
def test_rows_of_a_range_come_sorted_from_all_files(tmp_path: Path, in_order: bool) -> None:
    numbers = [(i * 7919) % 1000 for i in range(1000)]
    for file in range(3):
        mine = numbers[file::3]
        if in_order:
            mine = sorted(mine)
        table = pa.table(
            {
                "url": [f"u{n}" for n in mine],
                "uid": pa.array([n.to_bytes(16, "big") for n in mine], records.UID),
            }
        )
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=50)
    paths = sorted(tmp_path.iterdir())
    first, last = (100).to_bytes(16, "big"), (199).to_bytes(16, "big")
    table = uid_range.read(paths, first, last, ["uid", "url"])
    assert table.column_names == ["uid", "url"]
    assert table["url"].to_pylist() == [f"u{n}" for n in range(100, 200)]
    wanted = [n.to_bytes(16, "big") for n in (5, 150, 101, 300, 2000)]
    table = uid_range.read(paths, first, last, ["url", "uid"], among=pa.array(wanted, records.UID))
    assert table["url"].to_pylist() == ["u101", "u150"]
    beyond = (5000).to_bytes(16, "big")
    assert uid_range.read(paths, beyond, beyond, ["uid", "url"]).num_rows == 0


def test_row_groups_outside_the_range_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = [n.to_bytes(16, "big") for n in range(1000)]
    path = tmp_path / "sorted.parquet"
    pq.write_table(pa.table({"uid": pa.array(uids, records.UID)}), path, row_group_size=100)
    groups: list[int] = []
    own = pq.ParquetFile.read_row_group

    def watch(parquet: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        groups.append(group)
        return own(parquet, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    assert uid_range.read([path], uids[250], uids[310], ["uid"]).num_rows == 61
    assert groups == [2, 3]


@given(st.sets(UIDS, max_size=60), st.lists(UIDS, max_size=5), st.integers(1, 9))
def test_ascending_ranges_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, uids: set[bytes], bounds: list[bytes], group: int
) -> None:
    path = tmp_path_factory.mktemp("ascending") / "sorted.parquet"
    table = pa.table({"uid": pa.array(sorted(uids), records.UID), "n": range(len(uids))})
    pq.write_table(table, path, row_group_size=group)
    first, *rest = sorted([*bounds, bytes(16)])
    with closing(uid_range.Ascending(path, ["uid", "n"], first)) as rows:
        for bound in rest:
            assert rows.before(bound)["uid"].to_pylist() == [
                uid for uid in sorted(uids) if first <= uid < bound
            ]
            first = bound
        left = rows.before(None)
    assert left["uid"].to_pylist() == [uid for uid in sorted(uids) if uid >= first]
    assert left["n"].to_pylist() == list(range(len(uids) - len(left), len(uids)))


def test_cuts_are_between_addresses() -> None:
    first, last = uid_range.bounds(3, 8)
    cuts = uid_range.cuts(first, last, 7)
    assert len(cuts) == 6
    assert all(cut[8:] == bytes(8) for cut in cuts)
    widths = np.diff([int.from_bytes(uid[:8], "big") for uid in (first, *cuts, last)])
    assert widths.max() - widths.min() <= 1
    assert uid_range.cuts(first, last, 1) == []


def test_position_among_sorted_uids() -> None:
    uids = [bytes(8) + bytes([n]) * 8 for n in (1, 3, 3, 5)] + [b"\xff" * 16]
    array = pa.array(uids, records.UID)
    for uid in (*uids, bytes(16), bytes(8) + bytes([4]) * 8, b"\1" + bytes(15)):
        assert uid_range.position(array, uid) == sum(other < uid for other in uids)
