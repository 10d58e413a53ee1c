"""Pools of pairs: columns under their usual names, rows accounted for, damage contained."""

from __future__ import annotations

import csv
import gzip
import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_build.extract import ExtractSettings, plan, pool
from dataset_build.extract.candidates import Candidates
from dataset_build.extract.columns import Columns
from pipeline.config import BadInput, ConfigError, UserError
from pipeline.stage import Run

from .conftest import Extract, Root

URLS = ["http://a.example/1.jpg", "http://a.example/2.jpg", None, "/relative.jpg"]
TEXTS = ["a brown dog", None, "a black cat", "a green bird"]


@pytest.mark.parametrize(
    ("url", "text"),
    [("url", "text"), ("URL", "TEXT"), ("url", "caption"), ("image_url", "alt_text")],
)
def test_columns_are_found(tmp_path: Path, extract: Extract, url: str, text: str) -> None:
    table = pa.table({"similarity": [0.1] * 4, text: TEXTS, url: URLS})
    pq.write_table(table, tmp_path / "part.parquet")
    rows, stats = extract(pool=[f"{tmp_path}/*.parquet"], snapshot="laion")
    assert [(row["url"], row["text"]) for row in rows] == [(URLS[0], TEXTS[0])]
    assert (rows[0]["source"], rows[0]["snapshot"], rows[0]["file"]) == (
        "laion", "laion", "part.parquet",
    )  # fmt: skip
    assert stats.rows_in == 4
    assert stats.dropped == {"no_text": 1, "bad_url": 2}


def test_columns_are_given(tmp_path: Path, extract: Extract) -> None:
    table = pa.table({"url": ["x"], "u": ["http://a.example/u.jpg"], "t": ["one two"]})
    pq.write_table(table, tmp_path / "part.parquet")
    rows, _ = extract(
        pool=[f"{tmp_path}/part.parquet"], columns={"url": "u", "text": "t"}, snapshot=""
    )
    assert (rows[0]["url"], rows[0]["source"]) == ("http://a.example/u.jpg", "pool")
    with pytest.raises(ConfigError, match=r"no 'tt'; it has url, u, t: set extract\.columns\.text"):
        extract(pool=[f"{tmp_path}/part.parquet"], columns={"text": "tt"})


def test_a_damaged_row_group_loses_itself_only(tmp_path: Path, extract: Extract) -> None:
    path = tmp_path / "part.parquet"
    count = 300
    urls = [f"http://a.example/{i}.jpg" for i in range(count)]
    texts = [f"dog of number {i}" for i in range(count)]
    table = pa.table({"url": urls, "text": texts})
    pq.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    with pq.ParquetFile(path) as parquet:
        offset = parquet.metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xa5" * 200
    path.write_bytes(data)
    rows, stats = extract(pool=[str(path)])
    assert [row["url"] for row in rows] == urls[:100] + urls[200:]
    assert stats.rows_in == count
    assert stats.dropped == {"broken_row_group": 100}


def test_bytes_that_are_no_utf8_cost_themselves_only(tmp_path: Path, extract: Extract) -> None:
    texts = pa.array([b"a brown dog", b"a \xff black cat"], pa.binary())
    broken = pa.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"url": URLS[:2], "text": broken}), tmp_path / "x.parquet")
    rows, _ = extract(pool=[f"{tmp_path}/x.parquet"])
    assert [row["text"] for row in rows] == ["a brown dog", "a \ufffd black cat"]


@pytest.mark.parametrize(
    "values", [[["a dog"]], [3], [{"en": "a dog"}]], ids=["list", "int", "map"]
)
def test_columns_that_hold_no_text_are_refused(
    tmp_path: Path, extract: Extract, values: list[Any]
) -> None:
    pq.write_table(
        pa.table({"url": ["http://a.example/x"], "text": values}), tmp_path / "x.parquet"
    )
    with pytest.raises(ConfigError, match=r"x\.parquet: its column text holds \S.*, not text"):
        extract(pool=[f"{tmp_path}/x.parquet"])


def test_two_columns_of_one_name_are_refused(tmp_path: Path, extract: Extract) -> None:
    names = ["url", "text", "text"]
    pq.write_table(pa.table([["http://a.example/x"]] * 3, names=names), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet: two of its columns are called text"):
        extract(pool=[f"{tmp_path}/x.parquet"])


def test_a_table_without_rows_is_said(tmp_path: Path, extract: Extract) -> None:
    pq.write_table(pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.null())}),
                   tmp_path / "x.parquet")  # fmt: skip
    write(tmp_path / "y.csv", b"url,text\n")
    rows, stats = extract(pool=[str(tmp_path)])
    assert rows == []
    assert set(stats.warnings.values()) == {"no row in it"}
    assert len(stats.warnings) == 2


def test_a_file_by_several_names_is_read_once(
    tmp_path: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.table({"url": ["http://a.example/x"], "text": ["a dog"]}), tmp_path / "X.PARQUET"
    )
    monkeypatch.chdir(tmp_path)
    names = ["X.PARQUET", f"{tmp_path}/X.PARQUET", f"../{tmp_path.name}/*.PARQUET", str(tmp_path)]
    assert len(extract(pool=names)[0]) == 1


def test_no_parquet_is_named(tmp_path: Path, extract: Extract) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"x\.parquet: not a readable parquet file"):
        extract(pool=[f"{tmp_path}/x.parquet"])


PAIRS = [(f"http://a.example/{i}.jpg", f"dog of number {i}") for i in range(1000)]


def rows_of(extracted: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["url"], row["text"]) for row in extracted]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv", ".tsv.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_are_rows(tmp_path: Path, extract: Extract, ending: str, mark: str) -> None:
    tab = "\t" if "tsv" in ending else ","
    lines = [f"id{tab}TEXT{tab}URL", *(f"1{tab}{text}{tab}{url}" for url, text in PAIRS)]
    path = write(tmp_path / f"a{ending}", (mark + "\r\n".join(lines)).encode())
    rows, stats = extract(pool=[str(tmp_path)], columns="laion")
    assert rows_of(rows) == PAIRS
    assert {row["file"] for row in rows} == {path.name}
    assert stats.rows_in == len(PAIRS)


def test_a_csv_file_has_quotes_and_a_tsv_file_has_none(tmp_path: Path, extract: Extract) -> None:
    url = "http://a.example/1.jpg"
    write(
        tmp_path / "a.csv", f'url,text,page\n{url},"a ""big"" dog,\nand a cat",http://p/\n'.encode()
    )
    write(tmp_path / "b.tsv", f'{url}\t12" of snow\n{url}\ta "big" dog\n'.encode())
    rows, _ = extract(pool=[f"{tmp_path}/a.csv"])
    assert rows_of(rows) == [(url, 'a "big" dog, and a cat')]
    assert rows[0]["page_url"] == "http://p/"
    rows, _ = extract(pool=[f"{tmp_path}/b.tsv"], columns="cc12m")
    assert rows_of(rows) == [(url, '12" of snow'), (url, 'a "big" dog')]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ("cc12m", "{url}\t{text}"),
        ("cc3m", "{text}\t{url}"),
        ({"names": ["id", "caption", "url"]}, "7\t{text}\t{url}"),
        ({"names": ["a", "b", "c"], "url": "a", "text": "c"}, "{url}\t-\t{text}"),
    ],
)
def test_files_without_names(tmp_path: Path, extract: Extract, columns: Any, line: str) -> None:
    lines = [line.format(url=url, text=text) for url, text in PAIRS]
    write(tmp_path / "a.tsv", "\n".join(lines).encode())
    rows, stats = extract(pool=[f"{tmp_path}/a.tsv"], columns=columns)
    assert rows_of(rows) == PAIRS
    assert not stats.dropped


def test_a_first_line_of_no_names_is_said(tmp_path: Path, extract: Extract) -> None:
    write(tmp_path / "a.tsv", b"http://a.example/1.jpg\ta dog and a cat\n")
    with pytest.raises(ConfigError, match=r"a\.tsv: no column called url.*columns\.names"):
        extract(pool=[f"{tmp_path}/a.tsv"])
    write(tmp_path / "b.csv", b"")
    with pytest.raises(BadInput, match=r"b\.csv: empty"):
        extract(pool=[f"{tmp_path}/b.csv"])
    write(tmp_path / "u.csv", "url,text\n".encode("utf-16"))
    with pytest.raises(BadInput, match=r"u\.csv: written in UTF-16"):
        extract(pool=[f"{tmp_path}/u.csv"])
    write(tmp_path / "c.csv", b"url;text\n")
    with pytest.raises(ConfigError, match=r"c\.csv: .* it has url;text: is ';' between"):
        extract(pool=[f"{tmp_path}/c.csv"])


def test_a_bad_line_costs_itself_only(tmp_path: Path, extract: Extract) -> None:
    good = "http://a.example/{}.jpg,a dog and cat {}"
    lines = [
        "url, text ",
        good.format(1, 1),
        "http://a.example/2.jpg",  # too short
        "",
        good.format(3, 3) + ",more,still more",
        good.format(4, "\udcff"),  # no UTF-8
        good.format(5, "x" * 3_000_000),  # longer than any line may be
        good.format(6, 6),
        'http://a.example/7.jpg,"never closed',
        *(good.format(i, i) for i in range(8, 300)),
        'http://a.example/300.jpg,"a "big" dog"',
        'http://a.example/301.jpg,"never closed here too',
        good.format(302, 302),
    ]
    write(tmp_path / "a.csv", "\n".join(lines).encode("utf-8", "surrogateescape"))
    rows, stats = extract(pool=[f"{tmp_path}/a.csv"])
    numbers = [1, "\ufffd", 6, *range(8, 300), 302]
    assert [row["text"] for row in rows] == [f"a dog and cat {number}" for number in numbers]
    assert stats.dropped == {"bad_row": 6}
    assert stats.rows_in == len(rows) + 6
    assert list(stats.warnings.values()) == ["1 text not written in UTF-8: letters are lost"]


@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 3
        ),
        max_size=20,
    )
)
def test_rows_are_those_that_were_written(written: list[tuple[str, str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(written)
    read = io.TextIOWrapper(io.BytesIO(text.getvalue().encode()), "utf-8", newline="\n")
    kept = [list(row) for row in written if "".join(row) or len(row) > 1]
    assert [row for row in pool._rows(pool._lines(read), ",", 3) if row] == kept


def test_long_tables_tell_how_far_they_are(tmp_path: Path) -> None:
    """Rows of two lines each, as many as make every count of lines odd."""
    path = tmp_path / "a.csv"
    path.write_text("url,text\n" + 'http://a.example/x.jpg,"two\nlines"\n' * 50_000)
    shares: list[float] = []
    with Candidates(tmp_path / "out.parquet", ExtractSettings(), "s") as out:
        pool.extract(path, out, shares.append, source="s", columns=Columns())
    assert len(shares) == 12
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv.gz", b"<html>404", "a.csv.gz: cannot be read"),
        ("a.csv.gz", gzip.compress(b"url,text\n" * 9)[:12], "a.csv.gz: cannot be read"),
        ("a.csv", gzip.compress(b"url,text"), "a.csv: no column called url"),
        ("a.PARQUET", b"url,text", "a.PARQUET: not a readable parquet file"),
        ("a.txt", b"url,text\n", "a.txt: a pool's name ends in .parquet, .csv"),
    ],
    ids=["no gzip", "nothing whole", "gzip", "no parquet", "no table"],
)
def test_what_is_no_table_is_named(
    tmp_path: Path, extract: Extract, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        extract(pool=[f"{tmp_path}/{name}"])
    assert words in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_compressed_file_keeps_what_is_before_its_damage(
    tmp_path: Path, extract: Extract, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    random.seed(0)
    pairs = [(url, f"dog {random.getrandbits(200):x}") for url, _ in PAIRS]
    lines = ["url,text", *(f"{url},{text}" for url, text in pairs)]
    data = bytearray(gzip.compress("\n".join(lines).encode()))
    middle = len(data) // 2
    data[middle:] = b"" if damage == "cut" else b"\xff" * (len(data) - middle)
    (tmp_path / "a.csv.gz").write_bytes(data)
    rows, stats = extract(pool=[f"{tmp_path}/a.csv.gz"], min_words=1)
    assert 300 < len(rows) < 700
    assert rows_of(rows) == pairs[: len(rows)]
    assert stats.counts["truncated_files"] == 1
    assert "a.csv.gz: damaged or cut off: what follows on that is lost" in caplog.text
    assert list(stats.warnings) == [f"{tmp_path}/a.csv.gz"]


@pytest.mark.parametrize("bytes_per_task", [1, 3000, 12_000, 10**9])
def test_a_large_file_is_read_by_many_tasks(
    tmp_path: Path, extract: Extract, bytes_per_task: int
) -> None:
    url, text = zip(*PAIRS, strict=True)
    pq.write_table(pa.table({"url": url, "text": text}), tmp_path / "b.parquet", row_group_size=90)
    for name in ("a", "c"):
        pq.write_table(
            pa.table({"url": url[:1], "text": [name * 9 + " dog"]}), tmp_path / f"{name}.parquet"
        )
    settings = ExtractSettings(
        pool=(str(tmp_path),), bytes_per_task=bytes_per_task, files_per_task=3
    )
    tasks = plan(Run(tmp_path / "run", Root(extract=settings)))
    parts = [task.params["row_groups"] for task in tasks if "row_groups" in task.params]
    edges = [edge for part in parts for edge in part]
    if bytes_per_task == 1:
        assert parts == [[i, i + 1] for i in range(12)]
    elif parts:
        assert edges[0] == 0 and edges[-1] == 12 and edges[1:-1:2] == edges[2::2]
        size = (tmp_path / "b.parquet").stat().st_size
        assert sum(task.params.get("bytes", 0) for task in tasks) == pytest.approx(size, abs=12)
    else:
        assert [len(task.reads) for task in tasks] == [3]
    rows, stats = extract(pool=[str(tmp_path)], bytes_per_task=bytes_per_task, files_per_task=3)
    assert [row["text"] for row in rows] == ["a" * 9 + " dog", *text, "c" * 9 + " dog"]
    assert stats.rows_in == 1002


def test_a_large_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    url, text = zip(*PAIRS, strict=True)
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"url": url, "text": text}), path)
    path.write_bytes(path.read_bytes()[:-50])
    settings = ExtractSettings(pool=(str(path),), bytes_per_task=100)
    with pytest.raises(BadInput, match=r"b\.parquet: not a readable parquet file"):
        plan(Run(tmp_path / "run", Root(extract=settings)))
