from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_build import lists
from dataset_build.hashing import identify
from dataset_build.lists import Kind, Lists, ListSettings, ListsSettings
from pipeline.config import ConfigError, MissingInput, UserError
from pipeline.stage import Attempt, Run, Stage, Task
from pipeline.stop import StopFlag
from tests.dataset_build.hand_made import Config

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_list(text: str, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_list


def listed(kind: Kind, *paths: Path) -> Lists:
    return Lists.read({"blocked": {kind: paths}})


def test_an_address_is_listed_however_it_is_spelled(write: Write) -> None:
    known = listed(
        "addresses",
        write("# abuse\n\nhttp://a.example/x/1.jpg?b=%7e  # the first\nhttps://B.example\n"),
    )
    for url in (
        "http://a.example/x/1.jpg?b=%7e",
        "https://a.example/x/1.jpg?b=~",
        "HTTP://A.Example:80/x/../x/1.jpg?b=%7E#top",
        "http://b.example/",
        "http://a.example/y/%2e%2E/x/%2e/1.jpg?b=~",
    ):
        assert known.reason_of_address(url) == "blocked", url
    for url in (
        "http://a.example/x/1.jpg",
        "http://a.example/x/1.jpg?b=%7F",
        "http://a.example:8080/x/1.jpg?b=~",
        "http://www.a.example/x/1.jpg?b=~",
        "http://a.example/X/1.jpg?b=~",
        "http://b.example/x",
        "no address",
        "http://[::1/",
    ):
        assert known.reason_of_address(url) == "", url


def test_a_domain_covers_what_is_below_it_and_nothing_beside_it(write: Write) -> None:
    known = listed("domains", write("Bad.org\nimg.mixed.org\nbücher.example\n10.0.0.1\n"))
    for host in (
        "bad.org",
        "a.b.bad.org",
        "BAD.org.",
        "img.mixed.org",
        "1.img.mixed.org",
        "xn--bcher-kva.example",
        "10.0.0.1",
        "_a.bad.org",
        "a-.BAD.org.",
        "-.bad.org",
    ):
        assert known.reason_of_address(f"http://{host}/1.jpg") == "blocked", host
    for host in ("notbad.org", "org", "bad.org.example", "mixed.org", "www.mixed.org", "10.0.0.2"):
        assert known.reason_of_address(f"http://{host}/1.jpg") == "", host
    assert known.reason_of_address(f"http://bad.org/{'x' * 5000}") == "blocked"


def test_whole_columns_are_judged_as_single_values_are(write: Write) -> None:
    urls = [f"http://h{i % 9}.site{i % 7}.example/p{i}%20|{i % 3}.jpg" for i in range(500)]
    uids = identify(urls, ["x"] * len(urls))
    digests = [hashlib.sha256(url.encode()).digest() for url in urls]
    known = Lists.read(
        {
            "blocked": {
                "addresses": [write("\n".join(urls[::5]), "a")],
                "sha256": [write("\n".join(d.hex() for d in digests[::4]), "s")],
                "uids": [write("\n".join(u.hex().upper() for u in uids[::3]), "u")],
            },
            "opted_out": {
                "domains": [write("site3.example\nh1.site2.example", "d")],
                "sha256": [write("\n".join(d.hex() for d in digests[::6]), "t")],
            },
        }
    )
    column = pa.chunked_array([pa.array(urls[:7]), pa.array(urls[7:])])
    got = [known.reasons[code] for code in known.codes_of_addresses(column)]
    assert got == [known.reason_of_address(url) for url in urls]
    assert got[:25:5] == ["blocked"] * 5
    assert {got[i] for i in (3, 17)} == {"opted_out"}
    assert got.count("") == sum(
        i % 5 > 0 and i % 7 != 3 and not (i % 7 == 2 and i % 9 == 1) for i in range(500)
    )
    of_files = [
        known.reasons[code] for code in known.codes_of_digests(pa.array(digests, pa.binary(32))[3:])
    ]
    assert of_files == [known.reason_of_digest(digest) for digest in digests[3:]]
    assert of_files == [
        "blocked" if i % 4 == 0 else "opted_out" if i % 6 == 0 else "" for i in range(3, 500)
    ]
    of_pairs = known.codes_of_uids(pa.array(uids, pa.binary(16)))
    assert np.flatnonzero(of_pairs).tolist() == list(range(0, 500, 3))
    assert known.reason_of_uid(uids[3]) == "blocked"
    assert known.reason_of_uid(identify([urls[3]], ["y"])[0]) == ""


def test_perceptual_hashes_are_given_as_words(write: Write) -> None:
    one, other = "f" * 16 + "0" * 48, "0" * 63 + "7"
    known = Lists.read(
        {
            "blocked": {"perceptual": [write(f"{one}\n{other}\n{one}\n", "p")]},
            "opted_out": {"perceptual": [write(f"{one}\n", "q")]},
        }
    )
    hashes, codes = known.perceptual
    assert hashes.tolist() == [[0, 0, 0, 7], [2**64 - 1, 0, 0, 0], [2**64 - 1, 0, 0, 0]]
    assert [known.reasons[code] for code in codes] == ["blocked", "blocked", "opted_out"]
    assert listed("domains", write("a.example")).perceptual[0].shape == (0, 4)


def test_compressed_lists_and_tables(tmp_path: Path, write: Write) -> None:
    packed = tmp_path / "list.txt.gz"
    packed.write_bytes(gzip.compress(b"a.example\n# b.example\n"))
    known = listed("domains", packed)
    assert known.reason_of_address("http://a.example/1") == "blocked"
    assert known.reason_of_address("http://b.example/1") == ""
    table = tmp_path / "list.parquet"
    digest = hashlib.sha256(b"x").digest()
    pq.write_table(pa.table({"n": [1], "sha256": pa.array([digest], pa.binary(32))}), table)
    assert listed("sha256", table).reason_of_digest(digest) == "blocked"
    with pytest.raises(ConfigError, match=r"list\.parquet: a list of uids has a column uid"):
        listed("uids", table)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"list\.txt\.gz:\d: cannot be read"):
        listed("domains", packed)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("addresses", "a.example/1.jpg"),
        ("addresses", "ftp://a.example/1.jpg"),
        ("addresses", "http://"),
        ("domains", "http://a.example"),
        ("domains", "*.a.example"),
        ("domains", "a.example:80"),
        ("domains", "com"),
        ("domains", "co.uk"),
        ("sha256", "0" * 63),
        ("sha256", "0" * 65),
        ("sha256", "0" * 62 + " 0"),
        ("perceptual", "g" * 64),
        ("uids", "0" * 64),
    ],
)
def test_a_bad_line_is_named(write: Write, kind: Kind, bad: str) -> None:
    good = {"addresses": "http://a.example/1", "domains": "a.example", "uids": "0" * 32}
    path = write(f"{good.get(kind, '0' * 64)}\n# {bad}\n{bad}\n")
    with pytest.raises(ConfigError) as raised:
        listed(kind, path)
    assert str(raised.value).startswith(f"{path}:3: {bad!r}: ")


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a.example\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"list\.txt:2: cannot be read"):
        listed("domains", path)


def stage(name: str, *kinds: Kind) -> Stage:
    def plan(run: Run) -> list[Task]:
        return lists.reading(run, [Task(name, 0, params={"own": 1})], *kinds)

    return Stage(name, (), plan, lambda attempt: pytest.fail("not run"))


def run_with(folder: Path, **named: Any) -> Run:
    """A run whose blocklists are these."""
    return Run(folder, Config(lists=ListsSettings(blocked=ListSettings(**named))))


def test_a_task_is_known_by_the_lists_that_it_reads(tmp_path: Path, write: Write) -> None:
    path = write("a.example\n" + "#" * 68_000_000 + "\n")  # too long to be known by all its bytes
    fetch, keep = stage("download", "addresses", "domains"), stage("screen", "sha256")

    def fingerprints(**named: Any) -> tuple[str, str]:
        run = run_with(tmp_path / "run", **named)
        return tuple(one.planned(run, 0, 0)[0].fingerprint for one in (fetch, keep))  # type: ignore[return-value]

    without = fingerprints()
    before = fingerprints(domains=[str(tmp_path / "*.txt")])
    assert (before[0] != without[0], before[1]) == (True, without[1])
    assert fingerprints(domains=[str(path)]) == before
    content = bytearray(path.read_bytes())
    content[40_000_000:40_000_011] = b"\nb.example\n"
    path.write_bytes(content)
    after = fingerprints(domains=[str(path)])
    assert (after[0] != before[0], after[1]) == (True, without[1])
    with pytest.raises(MissingInput, match=r"lists\.blocked\.domains: .*none\.txt"):
        fingerprints(domains=[str(tmp_path / "none.txt")])


def test_a_run_reads_each_list_once(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.example\n")
    run = run_with(tmp_path / "run", domains=[str(path)], uids=[str(write("0" * 32, "uids"))])
    (planned,) = stage("download", "domains").planned(run, 0, 0)
    attempt = Attempt(run, planned.task, tmp_path, StopFlag())
    assert Lists.of(attempt).reason_of_address("http://a.example/1") == "blocked"
    monkeypatch.setattr(lists, "keys_of_file", lambda *_: pytest.fail("read again"))
    again = Lists.of(attempt)
    assert again.reason_of_address("http://a.example/1") == "blocked"
    assert again.reason_of_uid(bytes(16)) == ""  # its task reads no list of pairs
    (task,) = stage("download").plan(run)
    assert task == Task("download", 0, params={"own": 1})
    assert not Lists.of(Attempt(run, task, tmp_path, StopFlag()))


def test_a_list_that_changes_under_a_task_ends_it(tmp_path: Path, write: Write) -> None:
    path = write("a.example\n")
    run = run_with(tmp_path / "run", domains=[str(path)])
    (planned,) = stage("download", "domains").planned(run, 0, 0)
    path.write_text("b.example\n")
    with pytest.raises(UserError, match=r"list\.txt: changed since this task was planned"):
        Lists.of(Attempt(run, planned.task, tmp_path, StopFlag()))
