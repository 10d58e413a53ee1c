from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import records, screen
from dataset_build.download import DownloadSettings
from dataset_build.lists import Lists, ListsSettings
from dataset_build.screen import evaluation, perceptual
from dataset_build.screen.judge import Judge
from dataset_build.screen.verdicts import Verdicts
from pipeline.config import ConfigError, MissingInput
from pipeline.stats import Stats
from tests.dataset_build.screen.pool import Pair, Picture, Pool, jpeg, picture, smaller


def png(pixels: Any) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1])


def write_folder(path: Path, files: list[bytes]) -> str:
    (path / "below").mkdir(parents=True)
    (path / "labels.txt").write_text("not a picture")
    for number, data in enumerate(files):
        (path / "below" / f"{number}.png").write_bytes(data)
    return str(path)


def write_glob(path: Path, files: list[bytes]) -> str:
    write_folder(path, files)
    return str(path / "below" / "*.png")


def write_tar(path: Path, files: list[bytes]) -> str:
    path.mkdir()
    with tarfile.open(path / "0.tar", "w") as tar:
        for number, data in enumerate(files):
            for extension, content in ((".PNG", data), (".cls", b"3")):
                member = tarfile.TarInfo(f"{number}{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path / "*.tar")


def write_parquet(path: Path, files: list[bytes]) -> str:
    """As the Hugging Face hub has them."""
    path.mkdir()
    images = [{"bytes": data, "path": None} for data in files]
    pq.write_table(pa.table({"label": [3] * len(files), "image": images}), path / "0.parquet")
    return str(path)


@pytest.mark.parametrize("write", [write_folder, write_glob, write_tar, write_parquet])
def test_pictures_of_evaluation_sets_are_dropped(pool: Pool, tmp_path: Path, write: Any) -> None:
    shown = [picture(seed, 900, 600) for seed in range(4)]
    broken = b"\x89PNG of which nothing is left"
    pattern = write(tmp_path / "set", [*map(png, shown), broken])
    other = write_folder(tmp_path / "other", [png(picture(50))])
    pairs = [
        Pair(1, jpeg(picture(100))),
        Pair(2, png(shown[0]), stored=jpeg(smaller(shown[0], 256))),
        Pair(3, jpeg(smaller(shown[1], 150), 80)),
        Pair(4, jpeg(picture(101))),
        Pair(200, jpeg(smaller(shown[2], 256), 60)),
        Pair(201, broken, stored=jpeg(picture(102))),
    ]
    found = pool.screen(pairs, evaluation={"one": [pattern], "other": [other]})
    assert found.kept == [1, 4]
    assert {found.reasons[n] for n in (2, 3, 200, 201)} == {"evaluation"}
    (one,) = [bins for name, bins in found.histograms.items() if bins]
    assert one["exact"] == 2
    assert sum(one.values()) == 4
    stats = sum((manifest.stats for manifest in found.manifests[1:]), found.manifests[0].stats)
    assert stats.counts["evaluation_pictures"] == 6
    assert stats.counts["evaluation_pictures_undecodable"] == 1


def test_what_is_dropped_hands_its_picture_to_no_one(pool: Pool, tmp_path: Path) -> None:
    pattern = write_folder(tmp_path / "set", [png(picture(1))])
    pairs = [Pair(n, jpeg(picture(1), 70 + n)) for n in (1, 2, 3)]
    found = pool.screen(pairs, evaluation={"one": [pattern]})
    assert set(found.reasons.values()) == {"evaluation"}


def test_only_what_has_changed_is_done_again(pool: Pool, tmp_path: Path, inline: Any) -> None:
    folder = tmp_path / "set"
    pattern = write_folder(folder, [png(picture(1))])
    pairs = [Pair(n, jpeg(picture(n))) for n in (1, 2, 3)]
    run = pool.run(pairs, 2, ListsSettings(), {"evaluation": {"one": [pattern]}})

    def phases() -> list[str]:
        inline.ran.clear()
        inline.advance(run, [screen.STAGE])
        return [task.params["phase"] for task in inline.ran]

    assert phases() == ["look", "look", "evaluation", "collect", "near", "compare", "decide"]
    assert phases() == []
    (folder / "more.png").write_bytes(png(picture(3)))
    assert phases() == ["evaluation", "compare", "decide"]
    (reference,) = run.find("screen:hits-*")
    assert pq.read_table(run.path(reference))["row"].to_pylist() == [0, 2]


def test_sets_that_are_not_there_are_named(pool: Pool, tmp_path: Path) -> None:
    pairs = [Pair(1, jpeg(picture(1)))]
    with pytest.raises(MissingInput, match=r"screen\.evaluation\.one: .*missing"):
        pool.screen(pairs, evaluation={"one": [str(tmp_path / "missing" / "*.jpg")]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match=r"screen\.evaluation\.one: .*no picture, tar or parq"):
        pool.screen(pairs, evaluation={"one": [str(tmp_path / "empty")]})
    (tmp_path / "list.csv").write_text("a")
    with pytest.raises(ConfigError, match=r"evaluation\.one: .*list\.csv is neither a picture"):
        pool.screen(pairs, evaluation={"one": [str(tmp_path / "list.csv")]})
    pq.write_table(pa.table({"label": [3]}), tmp_path / "labels.parquet")
    with pytest.raises(ConfigError, match=r"no column of encoded pictures, only label"):
        pool.screen(pairs, evaluation={"one": [str(tmp_path / "labels.parquet")]})


def write_archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


SHOWN = [picture(seed, 900, 600) for seed in range(4)]


def without_names(path: Path) -> str:
    return write_archive(path / "0.tar", {f"{n}.img": jpeg(one) for n, one in enumerate(SHOWN)})


def linked(path: Path) -> str:
    (path / "set").mkdir()
    (path / "set" / "one.png").write_bytes(png(SHOWN[0]))
    (path / "elsewhere.png").mkdir()
    for number, one in enumerate(SHOWN):
        (path / "elsewhere.png" / f"{number}.png").write_bytes(png(one))
    (path / "set" / "class").symlink_to(path / "elsewhere.png")
    (path / "set" / "round").symlink_to(path / "set")
    return str(path / "set")


def write_table(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path / "0.parquet")
    return str(path / "0.parquet")


def after_an_id(path: Path) -> str:
    return write_table(path, {"id": [b"%d" % n for n in range(4)], "jpg": [*map(jpeg, SHOWN)]})


def in_two_columns(path: Path) -> str:
    views = pa.array([*map(png, SHOWN[2:])], pa.binary_view())
    return write_table(path, {"left": [*map(jpeg, SHOWN[:2])], "right": views})


def in_lists(path: Path) -> str:
    images = [[{"bytes": jpeg(one), "path": None} for one in SHOWN[n:][:2]] for n in (0, 2)]
    return write_table(path, {"images": [[], *images]})


@pytest.mark.parametrize(
    "write",
    [without_names, linked, after_an_id, in_two_columns, in_lists],
    ids=lambda f: f.__name__,
)
def test_pictures_are_found_wherever_they_are(pool: Pool, tmp_path: Path, write: Any) -> None:
    pairs = [Pair(n, jpeg(smaller(one, 256))) for n, one in enumerate([*SHOWN, picture(100)])]
    found = pool.screen(pairs, evaluation={"one": [write(tmp_path)]})
    assert found.kept == [4]


def nested(path: Path) -> str:
    inner = Path(write_archive(path / "inner.tar", {"0.png": png(SHOWN[0])})).read_bytes()
    return write_archive(path / "0.tar", {"x.png": png(SHOWN[1]), "class.tar": inner})


def of_paths(path: Path) -> str:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return write_table(path, {"image": pa.array([{"bytes": None, "path": "0.png"}], kind)})


def packed(path: Path) -> str:
    write_folder(path / "set", [png(SHOWN[0])])
    (path / "set" / "more.tar.gz").write_bytes(b"")
    return str(path / "set")


def cut(path: Path) -> str:
    return write_archive(path / "0.tar", {"0.png": png(SHOWN[0])[:300], "1.jpg": b""})


def broken(path: Path) -> str:
    return write_folder(path / "set", [b"", b"text"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (nested, r"0\.tar has an archive in it, class\.tar; unpack"),
        (lambda path: write_archive(path / "0.tar", {"a.txt": b"a"}), r"no picture, only \.txt"),
        (of_paths, "no column of encoded pictures, only image"),
        (packed, r"more\.tar\.gz: unpack it"),
        (cut, r"0\.tar: none of its 2 pictures can be decoded"),
        (broken, "none of its pictures can be decoded"),
    ],
)
def test_a_set_that_gives_no_picture_is_an_error(
    pool: Pool, tmp_path: Path, write: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"screen\.evaluation\.one: .*{message}"):
        pool.screen([Pair(1, jpeg(picture(1)))], evaluation={"one": [write(tmp_path)]})


def test_the_nearest_picture_of_a_set_counts(tmp_path: Path) -> None:
    """A set of several files has a hit in each."""
    hits = {"row": [0, 0], "set": ["one"] * 2, "distance": [3, 30]}
    sets = {"set": ["one"], "sha256": [bytes(32)], "pdq": [None], "pdq_quality": [None]}
    pq.write_table(pa.table(hits, schema=records.HITS), tmp_path / "hits")
    pq.write_table(pa.table(sets, schema=records.EVALUATION), tmp_path / "sets")
    stats, settings = Stats(), screen.ScreenSettings()
    judge = Judge(settings, Lists([]), [], [tmp_path / "sets"], [tmp_path / "hits"], stats)
    row = {"uid": [b""], "url": [""], "final_url": [""], "status": ["ok"], "sha256": [b""]}
    judge.judge("", pa.table(row), slice(0, 1), Verdicts(1, ()))
    assert +stats.histograms["evaluation:one"] == {"0+": 1}


def test_a_set_is_accounted_for(pool: Pool, tmp_path: Path) -> None:
    plain = np.full((60, 60, 3), 90, np.uint8)
    pattern = write_folder(tmp_path / "set", [png(SHOWN[0]), png(SHOWN[1]), png(plain), b"text"])
    found = pool.screen([Pair(1, jpeg(picture(9)))], evaluation={"one": [pattern]})
    stats = sum((manifest.stats for manifest in found.manifests[1:]), found.manifests[0].stats)
    assert dict(stats.histograms["evaluation_set:one"]) == {
        "pictures": 4,
        "too_plain": 1,
        "undecodable": 1,
    }


@pytest.mark.parametrize("distance", [0, 7, 15, 16, 31])
def test_the_index_finds_all_that_is_near_and_no_more(distance: int) -> None:
    random = np.random.default_rng(distance)
    entries = random.integers(0, 2, (300, 256), np.uint8)
    queries = entries[random.integers(0, 300, 400)]
    for row in queries:
        row[random.choice(256, random.integers(0, 40), replace=False)] ^= 1
    ones, others = (np.packbits(bits, axis=1).view("u8") for bits in (queries, entries))
    query, entry, apart = perceptual.Index(others).within(ones, distance)
    differing = (queries[:, None] != entries).sum(2)
    expected = np.stack(np.nonzero(differing <= distance), axis=1)
    assert np.stack([query, entry], axis=1).tolist() == expected.tolist()
    assert apart.tolist() == differing[query, entry].tolist()


def test_planted_photos_are_found_and_no_other(photos: list[Picture]) -> None:
    """Of 100 photos as a set, all copies in the pool; of 100 others in the pool none."""
    resize = evaluation.resizer(DownloadSettings())
    ours, others = photos[:100], photos[100:]
    index = perceptual.Index(_hashes([resize(jpeg(photo)) for photo in ours]))

    def hits(files: list[bytes]) -> set[int]:
        return set(index.within(_hashes([resize(data) for data in files]), 31)[0].tolist())

    assert len(hits([jpeg(photo) for photo in ours])) >= 99
    for side, quality in ((400, 50), (300, 75), (200, 85), (128, 70)):
        assert len(hits([jpeg(smaller(photo, side), quality) for photo in ours])) >= 95, side
    assert len(hits([jpeg(photo) for photo in others])) == 0


def _hashes(files: list[bytes]) -> Any:
    return perceptual.packed([perceptual.hash_of(data).pdq for data in files])
