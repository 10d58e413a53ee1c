from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import files


def test_identity_tells_contents_apart_not_names_or_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    a.write_bytes(b"same")
    b.write_bytes(b"same")
    c.write_bytes(b"else")
    assert files.identity(a) == files.identity(b) != files.identity(c)
    monkeypatch.setattr(files, "_WHOLE", 8)
    monkeypatch.setattr(files, "_CHUNK", 4)
    a.write_bytes(b"head middle tail")
    b.write_bytes(b"head muddle tail")
    c.write_bytes(b"head middle tall")
    assert files.identity(a) == files.identity(b) != files.identity(c)


def test_publish_once_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "d" / "x"
    assert files.publish_once(path, "first")
    assert not files.publish_once(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_link_in_place_replaces_and_repeats(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "out" / "t"
    source.write_text("new")
    target.parent.mkdir()
    target.write_text("old")
    for _ in range(2):
        files.link_in_place(source, target)
        assert target.read_text() == "new" and target.samefile(source)
        assert [p.name for p in target.parent.iterdir()] == ["t"]


def test_write_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_atomic(path, "one")
    files.write_atomic(path, b"two")
    assert path.read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_a_parquet_file_holds_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    noise = np.random.default_rng(0).integers(0, 2**63, 2_000_000)
    pq.write_table(pa.table({"noise": noise}), path, row_group_size=50_000, use_dictionary=False)
    before = held = pa.total_allocated_bytes()
    rows = 0
    with files.open_parquet(path) as parquet:
        for batch in parquet.iter_batches(10_000):
            rows += batch.num_rows
            held = max(held, pa.total_allocated_bytes())
    assert rows == noise.size
    assert held - before < path.stat().st_size / 8
