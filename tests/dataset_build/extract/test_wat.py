"""Image links of WAT records: both texts, base addresses, bad records, exact accounting."""

from __future__ import annotations

from pathlib import Path

from .conftest import Extract, members, metadata, record

PAGE = "http://www.a.example/news/page.html"


def test_links_become_candidates(tmp_path: Path, extract: Extract) -> None:
    images = [
        {"url": "/dog.jpg", "alt": "a brown dog"},
        {"url": "cat.jpg?w=1&amp;h=2", "alt": "Tom &amp; the caf&eacute;", "title": "Tom's  cat"},
        {"url": "//cdn.a.example/x.png", "title": "an X\nmark"},
        {"url": "/same.jpg", "alt": "same text", "title": "same text"},
        {"url": "/none.jpg"},
    ]
    (tmp_path / "CC-MAIN-2023-40-x.warc.wat.gz").write_bytes(
        b"".join(members(metadata(PAGE, images)))
    )
    rows, stats = extract(wat=[f"{tmp_path}/*.wat.gz"])
    assert [(row["url"], row["text"], row["source"]) for row in rows] == [
        ("http://www.a.example/dog.jpg", "a brown dog", "alt"),
        ("http://www.a.example/news/cat.jpg?w=1&h=2", "Tom & the café", "alt"),
        ("http://www.a.example/news/cat.jpg?w=1&h=2", "Tom's cat", "title"),
        ("http://cdn.a.example/x.png", "an X mark", "title"),
        ("http://www.a.example/same.jpg", "same text", "alt"),
    ]
    assert {row["page_url"] for row in rows} == {PAGE}
    assert {row["snapshot"] for row in rows} == {"CC-MAIN-2023-40"}
    assert {row["file"] for row in rows} == {"CC-MAIN-2023-40-x.warc.wat.gz"}
    assert (stats.rows_in, stats.rows_out) == (6, 5)
    assert stats.dropped == {"no_text": 1}
    assert stats.histograms["source"] == {"alt": 3, "title": 2}


def test_base_element_moves_relative_links(tmp_path: Path, extract: Extract) -> None:
    image = [{"url": "x.jpg", "alt": "some words"}]
    parts = [
        metadata(PAGE, image, base="http://b.example/files/"),
        metadata(PAGE, image, base="/up/"),
        metadata(PAGE, image, base="javascript:void(0)"),
    ]
    (tmp_path / "x.wat").write_bytes(b"".join(parts))
    rows, _ = extract(wat=[f"{tmp_path}/x.wat"])
    assert [row["url"] for row in rows] == [
        "http://b.example/files/x.jpg",
        "http://www.a.example/up/x.jpg",
        "http://www.a.example/news/x.jpg",
    ]


def test_half_a_surrogate_pair_is_no_bad_record(tmp_path: Path, extract: Extract) -> None:
    half = "\ud83d"  # an emoji that a length limit cut in two; JSON writes it as an escape
    images = [{"url": f"/x{half}.jpg", "alt": f"some words {half}", f"data-{half}": "x"}]
    (tmp_path / "x.wat").write_bytes(metadata(f"{PAGE}", images))
    rows, stats = extract(wat=[f"{tmp_path}/x.wat"])
    assert [(r["url"], r["text"]) for r in rows] == [("http://www.a.example/x.jpg", "some words")]
    assert stats.counts["bad_records"] == 0


def test_a_bad_record_costs_itself_only(tmp_path: Path, extract: Extract) -> None:
    good = metadata(PAGE, [{"url": "/x.jpg", "alt": "some words"}])
    bad = [
        record("metadata", PAGE, b'{"IMG@/src": '),
        record("metadata", PAGE, b'{"Envelope": {"path": "IMG@/src"}}'),
        record("metadata", PAGE, b'"IMG@/src"'),
        record("metadata", PAGE, b'\xff\xfe{"IMG@/src": 1}'),
        record("metadata", PAGE, b'{"IMG@/src": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        metadata(PAGE, [{"url": {"not": "a string"}, "alt": "other words"}]),
        metadata(PAGE, [{"url": "/y.jpg", "alt": ["no", "text"]}]),
    ]
    (tmp_path / "x.wat").write_bytes(b"".join([good, *bad, good]))
    rows, stats = extract(wat=[f"{tmp_path}/x.wat"])
    assert len(rows) == 2
    assert stats.counts["bad_records"] == 5
    assert stats.dropped == {"bad_url": 1, "no_text": 1}
    assert stats.rows_in == 4
