"""The stage as a whole: same seed, same bytes; the dirt that is declared is the dirt there is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pyarrow.parquet as pq
import pytest
from fastwarc.warc import ArchiveIterator

from pipeline import files
from pipeline.config import UserError
from pipeline.stage import Run
from sample_web import dirt, pages, scenes
from sample_web.stage import SampleWebSettings, plan

Build = Callable[[Path, SampleWebSettings], Run]
SMALL = {"articles": 110, "hours": 1, "evaluation_per_class": 1, "unseen_per_class": 1}


def images(out: Path) -> Iterator[tuple[str, str]]:
    """(absolute address, text) of every image link of every WAT, as an extractor sees them."""
    for path in sorted(out.glob("archive/**/*.wat.gz")):
        with path.open("rb") as stream:
            for record in ArchiveIterator(stream):
                if record.headers["Content-Type"] != "application/json":
                    continue
                envelope: dict[str, Any] = json.loads(record.reader.read())["Envelope"]
                answer = envelope["Payload-Metadata"].get("HTTP-Response-Metadata", {})
                page = answer.get("HTML-Metadata", {})
                url = envelope["WARC-Header-Metadata"].get("WARC-Target-URI", "")
                base = urljoin(url, page.get("Head", {}).get("Base", ""))
                for link in page.get("Links", ()):
                    if link["path"] == "IMG@/src":
                        text = unescape(link.get("alt") or link.get("title", ""))
                        yield resolved(base, unescape(link["url"])), text


def resolved(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:
        return url


def pool(out: Path) -> list[tuple[str, str]]:
    table = pq.read_table(out / "pool.parquet", columns=["URL", "TEXT"]).to_pydict()
    return list(zip(table["URL"], table["TEXT"], strict=True))


def test_equal_settings_give_equal_bytes(tmp_path: Path, build: Build) -> None:
    settings = SampleWebSettings(pairs=30, dirt=0.5, archive_files=2, **SMALL)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = build(tmp_path / name, settings.model_copy(update={"seed": seed}))
        outputs = [o for m in run.manifests("sample_web") for o in m.outputs]
        found.append({output.name: output.sha256 for output in outputs})
    assert found[0] == found[1]
    same = {name for name in found[0] if found[0][name] == found[2].get(name)}
    assert all("wordnet" in name for name in same), same


def test_no_caption_names_an_unseen_combination(
    web: Any, named: Callable[[str], set[tuple[str, str]]]
) -> None:
    texts = [text for _, text in (*images(web.out), *pool(web.out))]
    assert len(texts) > 400
    leaked = [text for text in texts if named(text) & scenes.UNSEEN]
    assert not leaked


def test_every_picture_is_routed_and_shown_once(web: Any) -> None:
    cited = {url for url, _ in (*images(web.out), *pool(web.out))}
    true = [(host, path) for host, path, kind in web.routes() if not kind]
    assert len(true) == web.settings.pairs
    missing = [pair for pair in true if f"http://{pair[0]}{pair[1]}" not in cited]
    # Only what a script would load is not to be found in the WAT.
    assert len(missing) <= 0.1 * web.settings.pairs


def test_declared_dirt_is_the_dirt_there_is(web: Any) -> None:
    declared = json.loads((web.out / "dirt.json").read_text())
    kinds = {f"http://{host}{path}": kind for host, path, kind in web.routes()}
    archived, pooled = list(images(web.out)), pool(web.out)
    lazy = sum(url == pages.LAZY for url, _ in archived)
    archived = [pair for pair in archived if pair[0] != pages.LAZY]
    found = Counter(kind_of(url, kinds) for url in {url for url, _ in archived + pooled})
    for kind in (*dirt.WEIGHTS, *dirt.FEW, "alias"):
        assert found[kind] == declared[kind] > 0, kind
    assert found["robots.txt"] == found["redirect_target"] == 0
    # Every kind but the true pairs is declared.
    assert set(found) - {""} <= set(declared)
    citations = Counter(archived)
    twice = [pair for pair, times in citations.items() if times > 1]
    told = Counter(url for url, _ in citations if kind_of(url, kinds) == "")
    twofold = [url for url, times in told.items() if times > 1]
    # A page may have hidden one citation of a pair behind its script, or told it in another way.
    assert declared["duplicate"] - 2 * lazy <= len(twice) <= declared["duplicate"]
    assert declared["recaptioned"] - lazy <= len(twofold)
    both = {url for url, _ in archived} & {url for url, _ in pooled}
    assert declared["also_in_pool"] - lazy <= len(both) <= declared["also_in_pool"]


def kind_of(url: str, kinds: dict[str, str]) -> str:
    """The sort of dirt an address is: by the server's table, else by its looks."""
    if url in kinds:
        return kinds[url]
    if url.startswith("data:"):
        return "data_uri"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "broken_url"
    if parts.scheme != "http" or not parts.hostname:
        return "broken_url"
    return "unknown_host" if parts.hostname.endswith(".nowhere.example") else "private_address"


def test_a_clean_web_has_no_dirt(tmp_path: Path, build: Build) -> None:
    settings = SampleWebSettings(pairs=20, dirt=0, repeat_share=0, **SMALL)
    run = build(tmp_path, settings)
    out = run.stage_folder("sample_web") / "out"
    assert not any(json.loads((out / "dirt.json").read_text()).values())
    assert sum(1 for _ in images(out)) + len(pool(out)) == settings.pairs


def test_candidates_repeat_pictures_under_new_addresses(tmp_path: Path, build: Build) -> None:
    settings = SampleWebSettings(pairs=20, candidates=3000, archive_files=2, **SMALL)
    out = build(tmp_path, settings).stage_folder("sample_web") / "out"
    cited = [*images(out), *pool(out)]
    assert len(cited) == 3000
    addresses = {url for url, _ in cited if "/mirror/" in url}
    assert len(addresses) == json.loads((out / "dirt.json").read_text())["mirror"] > 2000


def test_outputs_are_published_whole(web: Any) -> None:
    for one in web.run.manifests("sample_web"):
        assert one.stats.rows_out > 0
        for output in one.outputs:
            assert files.sha256(web.out / output.name) == output.sha256


def test_evaluation_sets_carry_classes_and_templates(web: Any) -> None:
    every = scenes.class_names()
    for name, shown, each in (
        ("sample_web", scenes.seen_classes(), 1),
        ("sample_web_unseen", scenes.unseen_classes(), 2),
    ):
        table = pq.read_table(web.out / "evaluation" / f"{name}.parquet")
        assert json.loads(table.schema.metadata[b"classes"]) == every
        assert all("{}" in t for t in json.loads(table.schema.metadata[b"templates"]))
        assert [every[label] for label in table["label"].to_pylist()] == shown * each


def test_sides_that_leave_no_room_are_refused(tmp_path: Path, build: Build) -> None:
    settings = SampleWebSettings(shortest_side=300, longest_side=320)
    with pytest.raises(UserError, match=r"longest_side: 320 .* raise it to 390"):
        build(tmp_path, settings)


def test_the_stage_module_imports_nothing_heavy() -> None:
    heavy = ("PIL", "numpy", "pyarrow", "xxhash", "sqlite3")
    code = f"import sys, sample_web.stage; print([m for m in {heavy} if m in sys.modules])"
    root = Path(plan.__code__.co_filename).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
