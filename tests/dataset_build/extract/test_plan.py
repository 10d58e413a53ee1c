"""Which files are read: patterns, and lists of paths as Common Crawl publishes them."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from dataset_build.extract import STAGE, ExtractSettings, plan
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.stage import Run

from .conftest import Extract, Root, members, metadata, page

CRAWL = "crawl-data/CC-MAIN-2024-10/segments/1/wat"


def crawl(root: Path) -> list[str]:
    """Two WAT files below `root`, as paths relative to it."""
    (root / CRAWL).mkdir(parents=True)
    names = [f"{CRAWL}/{name}.warc.wat.gz" for name in ("b", "a")]
    image = [{"url": "/x.jpg", "alt": "some words"}]
    for name in names:
        (root / name).write_bytes(b"".join(members(metadata("http://a.example/", image))))
    return names


@pytest.mark.parametrize("where", ["wat.paths.gz", "crawl-data/CC-MAIN-2024-10/wat.paths.gz"])
def test_a_list_of_paths(tmp_path: Path, extract: Extract, where: str) -> None:
    names = crawl(tmp_path)
    (tmp_path / where).write_bytes(gzip.compress("\n".join(names).encode() + b"\n\n"))
    rows, _ = extract(wat=[str(tmp_path / where)])
    assert [row["file"] for row in rows] == ["a.warc.wat.gz", "b.warc.wat.gz"]
    assert {row["snapshot"] for row in rows} == {"CC-MAIN-2024-10"}


def test_a_file_found_twice_is_read_once(tmp_path: Path) -> None:
    names = crawl(tmp_path)
    (tmp_path / "wat.paths").write_text("\n".join(names))
    settings = ExtractSettings(wat=(f"{tmp_path}/**/*.wat.gz", f"{tmp_path}/wat.paths"))
    tasks = plan(Run(tmp_path / "run", Root(extract=settings)))
    assert [Path(task.reads[0]).name for task in tasks] == ["a.warc.wat.gz", "b.warc.wat.gz"]
    assert [task.index for task in tasks] == [0, 1]


@pytest.mark.parametrize("patterns", [["*.gz", "*.gz"], ["*2024*.gz", "*.gz"]])
def test_a_further_snapshot_leaves_the_results_of_those_that_are_there(
    tmp_path: Path, patterns: list[str]
) -> None:
    """Tasks move to other places; their fingerprints, and so their outputs, stay."""
    links = []
    for name in crawl(tmp_path):
        links.append(tmp_path / f"CC-MAIN-2024-10-{Path(name).name}")
        links[-1].symlink_to(tmp_path / name)

    def fingerprints(pattern: str) -> dict[str, str]:
        root = Root(extract=ExtractSettings(wat=[f"{tmp_path}/{pattern}"]))
        planned = STAGE.planned(Run(tmp_path / "run", root), 0, 0)
        return {Path(p.task.reads[0]).name: p.fingerprint for p in planned}

    before = fingerprints(patterns[0])
    image = [{"url": "/y.jpg", "alt": "other words"}]
    earlier = tmp_path / "CC-MAIN-2023-50-c.warc.wat.gz"
    earlier.write_bytes(b"".join(members(metadata("http://b.example/", image))))
    after = fingerprints(patterns[1])
    assert list(after) == [earlier.name, *(path.name for path in sorted(links))]
    del after[earlier.name]
    assert after == before


def test_outputs_are_numbered_within_their_snapshot(tmp_path: Path, extract: Extract) -> None:
    names = crawl(tmp_path)
    other = tmp_path / "CC-MAIN-2023-50.wat.gz"
    other.symlink_to(tmp_path / names[0])
    extract(wat=[*(f"{tmp_path}/{name}" for name in names), str(other)])
    assert sorted(path.name for path in (tmp_path / "run/extract/out").iterdir()) == [
        "candidates-CC-MAIN-2023-50-00000.parquet",
        "candidates-CC-MAIN-2024-10-00000.parquet",
        "candidates-CC-MAIN-2024-10-00001.parquet",
    ]


@pytest.mark.parametrize("name", ["a/b", "a b", "a*", "ä"])
def test_a_snapshot_is_part_of_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        ExtractSettings(snapshot=name)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def planned(**settings: object) -> None:
        plan(Run(tmp_path / "run", Root(extract=ExtractSettings(**settings))))

    with pytest.raises(ConfigError, match="give at least one of wat, warc, pool"):
        planned()
    with pytest.raises(MissingInput, match=rf"extract\.warc: {tmp_path}/\*\.warc: no such input"):
        planned(warc=[f"{tmp_path}/*.warc"])
    with pytest.raises(
        MissingInput, match=rf"extract\.wat: {tmp_path}: no file in it ends in \.warc"
    ):
        planned(wat=[str(tmp_path)])
    (tmp_path / "wat.paths").write_text("crawl-data/a.wat.gz\n")
    with pytest.raises(MissingInput, match=r"crawl-data/a\.wat\.gz: listed in .*wat\.paths, but"):
        planned(wat=[f"{tmp_path}/wat.paths"])


def references(tmp_path: Path, **settings: object) -> list[str]:
    root = Root(extract=ExtractSettings(**settings))
    return [task.reads[0] for task in plan(Run(tmp_path / "run", root))]


def test_a_local_list_of_files_that_are_elsewhere(tmp_path: Path) -> None:
    name = f"{CRAWL}/a.warc.wat.gz"
    (tmp_path / "wat.paths").write_text(f"{name}\ns3://other/b.warc.wat.gz\n")
    for base in ("https://data.example", "https://data.example/", "s3://bucket/"):
        found = references(tmp_path, wat=[f"{tmp_path}/wat.paths"], base_url=base)
        assert found == sorted([f"{base.rstrip('/')}/{name}", "s3://other/b.warc.wat.gz"])
    with pytest.raises(MissingInput, match=r"extract\.base_url"):
        references(tmp_path, wat=[f"{tmp_path}/wat.paths"])
    with pytest.raises(ValueError, match="base_url"):
        ExtractSettings(base_url="/some/folder")


def test_a_folder_stands_for_the_files_below_it(tmp_path: Path) -> None:
    for name in ("a.warc.wat.gz", "b/c.warc.wat.gz", "b/d.warc.gz", "b/e.parquet", "wat.paths.gz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    folder = f"{tmp_path}/in"
    assert references(tmp_path, wat=[folder]) == [
        f"{folder}/a.warc.wat.gz",
        f"{folder}/b/c.warc.wat.gz",
    ]
    assert references(tmp_path, warc=[folder]) == [f"{folder}/b/d.warc.gz"]
    assert references(tmp_path, pool=[folder]) == [f"{folder}/b/e.parquet"]


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("https://a.example/*.wat.gz", ConfigError, r"extract\.wat: https://a\.example/\*.* list"),
        ("https://a.example/crawl/", ConfigError, "neither wildcards nor folders"),
        ("s4://bucket/a.wat", ConfigError, r"extract\.wat: s4://bucket/a\.wat: no such kind"),
    ],
)
def test_patterns_that_cannot_be_followed(
    pattern: str, error: type[UserError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        references(tmp_path, wat=[pattern])


def test_same_inputs_same_bytes(tmp_path: Path, extract: Extract) -> None:
    html = b"<img src=x.jpg alt='some words'>" * 50
    (tmp_path / "x.warc.gz").write_bytes(b"".join(members(page("http://a.example/", html))))
    output = tmp_path / "run/extract/out/candidates-archive-00000.parquet"
    extract(warc=[f"{tmp_path}/x.warc.gz"])
    first = output.read_bytes()
    for path in (tmp_path / "run/extract/done").iterdir():
        path.unlink()
    extract(warc=[f"{tmp_path}/x.warc.gz"])
    assert output.read_bytes() == first


@pytest.fixture
def data() -> Path:
    if not (folder := os.environ.get("OPENWIT_DATA")):
        pytest.skip("OPENWIT_DATA is not set: no real archives to read")
    return Path(folder)


def test_real_archives(data: Path, extract: Extract) -> None:
    """260 real pages in several languages: encodings and entities resolved, addresses absolute."""
    rows, stats = extract(
        wat=[f"{data}/webarchive/*.wat"],
        warc=[f"{data}/webarchive/*.warc.gz", f"{data}/webarchive/*.warc"],
    )
    assert stats.counts["pages"] == 264
    assert stats.counts["truncated_files"] == 1
    assert stats.counts["bad_records"] == 0
    assert len(rows) == stats.rows_out > 2400
    texts = {row["text"] for row in rows}
    assert "Gesichtsmasken schützen nur bedingt vor dem Coronavirus." in texts
    assert "Luxurious Magazine" in texts
    broken = ("\ufffd", "&amp;", "&quot;", "&#", "Ã¼", "Ã¤", "â€")
    assert [text for text in texts if any(sign in text for sign in broken)] == []
    assert all(row["url"].startswith(("http://", "https://")) for row in rows)
    hosts = {row["url"].split("/")[2] for row in rows}
    assert len(hosts) > 150


@pytest.mark.parametrize("files_per_task", [1, 2, 5, 100])
def test_a_task_reads_many_files_and_every_row_names_its_own(
    tmp_path: Path, extract: Extract, files_per_task: int
) -> None:
    for number in range(9):
        image = [{"url": "/x.jpg", "alt": f"some words {number}"}]
        records = members(metadata("http://a.example/", image))
        (tmp_path / f"{number}.warc.wat.gz").write_bytes(b"".join(records))
    html = b'<img src="/y.jpg" alt="words of a page">'
    (tmp_path / "p.warc.gz").write_bytes(b"".join(members(page("http://b.example/", html))))
    sources = {"wat": [f"{tmp_path}/*.wat.gz"], "warc": [f"{tmp_path}/p.warc.gz"]}
    settings = ExtractSettings(**sources, files_per_task=files_per_task)
    tasks = plan(Run(tmp_path / "run", Root(extract=settings)))
    assert [task.params["number"] for task in tasks] == list(range(-(-9 // files_per_task) + 1))
    assert {task.params["kind"] for task in tasks[:-1]} == {"wat"}
    assert sorted(len(task.reads) for task in tasks)[-1] == min(9, files_per_task)
    rows, stats = extract(**sources, files_per_task=files_per_task)
    assert [(row["file"], row["text"]) for row in rows] == [
        *((f"{number}.warc.wat.gz", f"some words {number}") for number in range(9)),
        ("p.warc.gz", "words of a page"),
    ]
    assert stats.rows_out == 10


def test_how_many_files_a_task_reads_makes_no_other_task_of_one(tmp_path: Path) -> None:
    crawl(tmp_path)
    fingerprints = set()
    for files_per_task in (2, 3):
        settings = ExtractSettings(wat=(str(tmp_path),), files_per_task=files_per_task)
        run = Run(tmp_path / "run", Root(extract=settings))
        [planned] = STAGE.planned(run, 0, 0)
        fingerprints.add(planned.fingerprint)
    assert len(fingerprints) == 1
