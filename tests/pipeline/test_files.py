from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event

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


def test_a_folder_is_removed_though_others_remove_it_too(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / str(number)
        for name in range(50):
            (folder / str(name)).mkdir(parents=True)
            (folder / str(name) / "file").write_bytes(b"four")
        with ThreadPoolExecutor(3) as pool:
            freed = list(pool.map(files.remove_tree, [folder] * 3))
        assert not folder.exists()
        assert max(freed) <= 200
    assert files.remove_tree(tmp_path / "never") == 0


def test_a_folder_is_removed_though_another_writes_into_it(tmp_path: Path) -> None:
    folder = tmp_path / "busy"
    (folder / "below").mkdir(parents=True)
    gone, ended = Event(), Event()

    def write() -> None:
        for number in count():
            try:
                (folder / "below" / str(number)).touch()
            except FileNotFoundError:
                gone.set()
                return
            if ended.wait(0.0005):
                return

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write)
        while not (folder / "below/9").exists():
            pass
        try:
            files.remove_tree(folder)
            assert gone.wait(10)
        finally:
            ended.set()
    assert not folder.exists()


def test_a_folder_that_may_not_be_removed_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        files.remove_tree(tmp_path / "file")
