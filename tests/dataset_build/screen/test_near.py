from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_build.screen import near, perceptual
from dataset_build.screen.near import UNHASHED, leaders
from tests.dataset_build.screen.pool import Pair, Picture, Pool, jpeg, picture, smaller, uid_of


def test_copies_in_other_sizes_and_qualities_are_one_picture(pool: Pool) -> None:
    copies = {3: picture(1), 5: smaller(picture(1), 100), 200: picture(1)}
    pairs = [Pair(n, jpeg(pixels, 70 + n % 20)) for n, pixels in copies.items()]
    pairs += [Pair(n, jpeg(picture(n))) for n in (4, 100, 250)]
    found = pool.screen(pairs)
    assert found.reasons == {
        3: "",
        4: "",
        5: "near_duplicate",
        100: "",
        200: "near_duplicate",
        250: "",
    }
    groups = {number: row["duplicate_group"] for number, row in found.rows.items()}
    assert groups == {n: uid_of(3 if n in copies else n) for n in groups}
    assert found.manifests[-1].stats.dropped == {"near_duplicate": 2}


def test_without_a_distance_only_files_are_compared(pool: Pool) -> None:
    pairs = [Pair(n, jpeg(picture(1), quality)) for n, quality in ((1, 90), (2, 80), (3, 90))]
    found = pool.screen(pairs, near_distance=None)
    assert found.reasons == {1: "", 2: "", 3: "duplicate_picture"}


def test_the_first_pairs_of_about_the_same_picture_keep_it(pool: Pool) -> None:
    qualities = {1: 90, 2: 80, 3: 90, 4: 70, 5: 80}
    pairs = [Pair(n, jpeg(picture(1), quality)) for n, quality in qualities.items()]
    found = pool.screen(pairs, pairs_per_picture=2)
    assert found.kept == [1, 2]
    assert set(found.reasons.values()) == {"", "near_duplicate"}
    assert pool.screen(pairs, pairs_per_picture=None).kept == [1, 2, 3, 4, 5]


def test_a_plain_picture_is_near_none(pool: Pool) -> None:
    plain = [np.full((120, 160, 3), grey, np.uint8) for grey in (90, 91, 200)]
    found = pool.screen([Pair(n, jpeg(pixels)) for n, pixels in enumerate(plain)])
    assert found.kept == [0, 1, 2]
    found = pool.screen([Pair(n, jpeg(plain[0])) for n in range(3)])
    assert found.reasons == {0: "", 1: "duplicate_picture", 2: "duplicate_picture"}


@pytest.mark.parametrize("files", [1, 3, 16])
@pytest.mark.parametrize("keys_at_once", [1 << 26, 512])
def test_the_verdicts_do_not_depend_on_the_cut(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, files: int, keys_at_once: int
) -> None:
    random = np.random.default_rng(0)
    shown = random.integers(0, 12, 40)
    pairs = [
        Pair(6 * n, jpeg(picture(int(what)), int(random.integers(60, 95))), f"text {n % 7}")
        for n, what in enumerate(shown)
    ]
    monkeypatch.setattr(near, "KEYS_AT_ONCE", keys_at_once)
    found = pool.screen(pairs, files)
    first = {what: 6 * n for n, what in reversed(list(enumerate(shown.tolist())))}
    assert found.kept == sorted(first.values())
    for n, what in enumerate(shown.tolist()):
        row = found.rows[6 * n]
        assert row["duplicate_group"] == uid_of(first[what])
        same = [f"text {other % 7}" for other in np.flatnonzero(shown == what)]
        assert row["captions"] == (list(dict.fromkeys(same)) if row["keep"] else [])


def by_definition(hashes: Any, alive: Any, distance: int) -> list[int]:
    leader = list(range(len(hashes)))
    kept: list[int] = []
    for row in np.flatnonzero(alive).tolist():
        for other in kept:
            if (hashes[row] != hashes[other]).sum() <= distance:
                leader[row] = other
                break
        else:
            kept.append(row)
    return leader


@pytest.mark.parametrize("seed", range(20))
def test_pictures_yield_to_the_first_that_is_kept(seed: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2, (60, 9))  # short, so that chains of likenesses are common
    alive = random.random(60) < 0.8
    classes = np.array([np.flatnonzero((hashes == one).all(1))[0] for one in hashes], np.uint32)
    heads = np.unique(classes)
    apart = (hashes[heads, None] != hashes[heads]).sum(2)
    edges = [(a, b) for i, a in enumerate(heads) for j, b in enumerate(heads) if i < j and apart[i, j] <= 2]  # fmt: skip  # noqa: E501
    found = leaders(classes, np.array(edges, np.uint32).reshape(-1, 2), alive)
    assert found.tolist() == by_definition(hashes, alive, 2)


def test_a_chain_does_not_merge_its_ends() -> None:
    classes = np.array([0, 1, 2, UNHASHED], np.uint32)
    edges = np.array([[0, 1], [1, 2]], np.uint32)
    assert leaders(classes, edges, np.ones(4, np.bool_)).tolist() == [0, 0, 2, 3]
    # Without the first, the middle one keeps its picture, and the last yields to it.
    assert leaders(classes, edges, np.array([0, 1, 1, 1], np.bool_)).tolist() == [0, 1, 1, 3]


def test_every_subset_of_the_weak_bits_is_flipped_once() -> None:
    weak = np.array([0b1011 << 7 | 1 << 31, 0xF], np.uint32)
    words = np.array([0xDEADBEEF, 0], np.uint32)
    found = np.stack(list(near.flipped(words, weak)))
    for column, mask in enumerate(weak.tolist()):
        changed = found[:, column] ^ words[column]
        assert len(set(changed.tolist())) == 16
        assert all(bits & ~mask == 0 for bits in changed.tolist())


@pytest.mark.parametrize("ranges", [2, 64, 1 << 20])
def test_ranges_of_keys_are_all_keys_once(ranges: int) -> None:
    random = np.random.default_rng(0)
    bits, weak = perceptual.bits_of(random.standard_normal((200, 256)))
    words, masks = (
        np.stack([_big(one.view("u4")[:, p]) for p in range(8)]) for one in (bits, weak)
    )
    classes = np.arange(200, dtype=np.uint32)
    classes[random.integers(0, 200, 20)] = UNHASHED

    def keys(number: int, of: int) -> Any:
        return near.keys_of(words, masks, classes, (3, number, of), lambda: None)

    every = keys(0, 1)
    bounds = np.searchsorted(every, np.arange(ranges + 1, dtype=object) * (2**64 // ranges))
    for number in np.unique(np.searchsorted(bounds, np.arange(0, every.size, 50), "right") - 1):
        own = every[bounds[number] : bounds[number + 1]]
        assert own.size
        assert keys(int(number), ranges).tolist() == own.tolist()


def test_edges_are_sorted_seldom_however_often_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_PAIRS_AT_ONCE", 16)
    random = np.random.default_rng(0)
    added = [random.integers(0, 2000, 10).astype(np.uint64) << np.uint64(32) for _ in range(1000)]
    edges, each_once, handled = near.Edges(), near.Edges.each_once, 0

    def counting(self: near.Edges) -> Any:
        nonlocal handled
        handled += self._size
        return each_once(self)

    monkeypatch.setattr(near.Edges, "each_once", counting)
    for pairs in added:
        edges.add(pairs)
    assert edges.each_once().tolist() == np.unique(np.concatenate(added)).tolist()
    assert handled < 4 * 10_000


def test_of_many_with_a_key_each_meets_the_first() -> None:
    rows = np.arange(1000, dtype=np.uint64)
    keys = np.concatenate([rows, np.uint64(7 << 32) + rows[:3]])
    met: set[tuple[int, int]] = set()
    for first, second in near.meetings(keys):
        assert (first < second).all()
        met |= set(zip(first.tolist(), second.tolist(), strict=True))
    assert {second for first, second in met if first == 0} == set(range(1, 1000))
    assert {(0, 1), (0, 2), (1, 2)} <= met
    assert len(met) < 64 * 1000


def test_copies_of_real_photos_meet(photos: list[Picture], tmp_path: Path) -> None:
    """The keys find what the exact search finds, of copies in all sizes and qualities."""
    copies = [smaller(photo, min(256, *photo.shape[:2])) for photo in photos]
    found = [[perceptual.hash_of(jpeg(copy)) for copy in copies]]
    for side in (96, 128, 192):
        found.append([perceptual.hash_of(jpeg(smaller(copy, side), 75)) for copy in copies])
    hashes = np.stack([perceptual.packed([one.pdq for one in row]) for row in found])
    weak = np.stack([perceptual.packed([one.weak for one in row]) for row in found])
    words, masks = (array.reshape(-1, 4).view(np.uint32) for array in (hashes, weak))
    rows = len(words)
    due = met = 0
    meeting: set[int] = set()
    for part in range(8):
        flips = near.flipped(_big(words[:, part]), _big(masks[:, part]))
        keys = np.concatenate([_packed(key) for key in flips])
        keys.sort()
        for first, second in near.meetings(keys):
            meeting |= set((first.astype(np.int64) * rows + second).tolist())
    number = len(photos)
    for copy in range(1, 4):
        distance = perceptual.distances(hashes[0], hashes[copy])
        for row in np.flatnonzero(distance <= 31).tolist():
            due += 1
            met += row * rows + copy * number + row in meeting
    assert due > 0.9 * 3 * number
    assert met >= 0.999 * due


def _big(words: Any) -> Any:
    return np.ascontiguousarray(words).view(">u4").astype(np.uint32)


def _packed(key: Any) -> Any:
    return key.astype(np.uint64) << np.uint64(32) | np.arange(key.size, dtype=np.uint64)
