"""The small WordNet: every offset leads to its line, in both kinds of file."""

from __future__ import annotations

from typing import Any

import pytest

from sample_web import scenes


@pytest.mark.parametrize(
    ("name", "letter"), [("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")]
)
def test_offsets_lead_to_the_lines_that_name_them(web: Any, name: str, letter: str) -> None:
    data = (web.out / "wordnet" / f"data.{name}").read_bytes()
    index = (web.out / "wordnet" / f"index.{name}").read_text()
    synsets = [line for line in data.decode().splitlines() if not line.startswith("  ")]
    assert synsets
    for line in synsets:
        fields = line.split(" | ")[0].split()
        assert fields[2] == letter
        count = int(fields[3], 16)
        pointers = fields[4 + 2 * count :]
        for start in range(1, 1 + 4 * int(pointers[0]), 4):
            _, offset, other, _ = pointers[start : start + 4]
            assert other == letter
            assert data[int(offset) :].startswith(f"{offset} ".encode())
        assert data[int(fields[0]) :].startswith(line.encode())
    lemmas = [line for line in index.splitlines() if not line.startswith("  ")]
    assert lemmas == sorted(lemmas, key=lambda line: line.split()[0])
    for line in lemmas:
        lemma, _, count, pointers, *rest = line.split()
        offsets = rest[int(pointers) + 2 :]
        assert len(offsets) == int(count)
        for offset in offsets:
            words = data[int(offset) :].split(b"\n", 1)[0].decode().split()[4:]
            assert lemma in {word.lower().partition("(")[0] for word in words}


def test_files_begin_with_a_licence_that_readers_skip(web: Any) -> None:
    for path in (web.out / "wordnet").iterdir():
        lines = path.read_text().splitlines()
        assert lines[0].startswith("  1 ")


def test_nouns_hang_below_what_they_are(web: Any) -> None:
    lines = (web.out / "wordnet" / "data.noun").read_text().splitlines()
    synsets = {line[:8]: line for line in lines if not line.startswith("  ")}
    names = {line.split()[4]: offset for offset, line in synsets.items()}
    for name in (*scenes.SHAPES, *scenes.COLOURS, "stripe", "North_Meadow"):
        path, offset = [name], names[name]
        while "@ " in synsets[offset]:
            offset = synsets[offset].split("@ ")[1].split()[0]
            path.append(synsets[offset].split()[4])
        assert path[-1] == "entity", path
