"""Lists after the fetch, and scores."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataset_build import screen
from dataset_build.lists import ListsSettings
from dataset_build.screen import measures, perceptual
from pipeline.config import ConfigError
from tests.dataset_build.screen.pool import Pair, Pool, jpeg, picture, smaller

PAIRS = [
    Pair(1, jpeg(picture(1)), url="http://a.example/1.jpg"),
    Pair(2, jpeg(picture(2)), url="http://b.example/2.jpg"),
    Pair(3, jpeg(picture(3)), url="http://www.c.example/3.jpg"),
    Pair(4, jpeg(picture(4)), url="http://d.example/4.jpg"),
    Pair(5, jpeg(smaller(picture(5), 90), 70), url="http://e.example/5.jpg"),
    Pair(6, jpeg(picture(6)), final_url="https://cdn.c.example/6.jpg"),
    Pair(7, jpeg(picture(7)), url="http://g.example/7.jpg"),
    Pair(200, jpeg(picture(2)), url="http://h.example/8.jpg"),
]


def listed(tmp_path: Path, **entries: list[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for kind, lines in entries.items():
        path = tmp_path / f"{kind}-{hashlib.md5(repr(lines).encode()).hexdigest()}.txt"
        path.write_text("\n".join(lines))
        found[kind] = (str(path),)
    return found


def test_what_is_listed_is_dropped_after_the_fetch(pool: Pool, tmp_path: Path) -> None:
    pdq = perceptual.hash_of(jpeg(picture(5))).pdq.hex()
    blocked = listed(
        tmp_path,
        addresses=["https://a.example/1.jpg"],
        domains=["c.example"],
        sha256=[hashlib.sha256(PAIRS[3].file).hexdigest()],
        perceptual=[pdq],
    )
    opted_out = listed(tmp_path, uids=[PAIRS[6].uid.hex()], domains=["a.example"])
    lists = ListsSettings.model_validate({"blocked": blocked, "opted_out": opted_out})
    found = pool.screen(PAIRS, lists=lists)
    assert found.reasons == {
        1: "blocked",
        2: "",
        3: "blocked",
        4: "blocked",
        5: "blocked",
        6: "blocked",
        7: "opted_out",
        200: "duplicate_picture",
    }
    assert found.histograms == {
        "list:blocked": {"address": 3, "file": 1, "picture": 1},
        "list:opted_out": {"uid": 1},
    }


def test_the_copy_of_a_listed_pair_keeps_the_picture(pool: Pool, tmp_path: Path) -> None:
    """Its address is what is wrong, not the picture; nor is its caption taken over."""
    lists = ListsSettings.model_validate({"blocked": listed(tmp_path, domains=["b.example"])})
    found = pool.screen(PAIRS, lists=lists)
    assert found.reasons[2] == "blocked"
    assert found.rows[200]["keep"]
    assert found.rows[200]["captions"] == ["text 200"]


def words(pictures: Sequence[Any], texts: Sequence[str]) -> Any:
    """The number that ends the text."""
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)
    return np.array([float(text.split()[-1]) for text in texts], np.float32)


def two_for_one(pictures: Sequence[Any], texts: Sequence[str]) -> Any:
    return np.zeros(2 * len(pictures), np.float32)


def blackened(pictures: Sequence[Any], texts: Sequence[str]) -> Any:
    for pixels in pictures:
        pixels[:] = 0
    return np.zeros(len(pictures), np.float32)


def all_at_once(pictures: Sequence[Any], texts: Sequence[str], factor: int) -> Any:
    return np.zeros((len(pictures), factor), np.float32)


partly: Any = functools.partial(all_at_once, factor=2)
try:
    import nothing_such  # type: ignore[import-not-found]  # noqa: F401
except ImportError:
    if True:

        def conditional(pictures: Sequence[Any], texts: Sequence[str]) -> Any:
            return np.ones(len(pictures), np.float32)


def redness(pictures: Sequence[Any], texts: Sequence[str]) -> Any:
    """Of the first channel, which is red if they are RGB."""
    return np.array([picture[..., 0].mean() for picture in pictures], np.float32)


@pytest.fixture
def scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The functions above as a module of the working directory."""
    (tmp_path / "my_scores.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)  # another test's
    return "my_scores"


def test_scores_decide_within_their_limits(pool: Pool, scoring: str) -> None:
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 2] = 250  # OpenCV's order
    pairs = [*PAIRS[:5], Pair(9, jpeg(red), "a red square, area 3")]
    scores = {
        "words": {"function": f"{scoring}:words", "at_least": 2, "at_most": 4},
        "red": {"function": f"{scoring}:redness"},
    }
    found = pool.screen(pairs, scores=scores, near_distance=None)
    low = dict.fromkeys((1, 5), "score:words")
    assert found.reasons == {**dict.fromkeys((2, 3, 4, 9), ""), **low}
    assert found.histograms["score:words"] == {"1": 1, "2": 1, "3": 2, "4": 1, "5": 1}
    looked = [pq.read_table(found.run.path(r)) for r in found.run.find("screen:looked-*")]
    values = [value for table in looked for value in table["score_red"].to_pylist()]
    assert values[-1] > 230


def test_a_changed_function_is_asked_again(
    pool: Pool, scoring: str, tmp_path: Path, inline: Any
) -> None:
    def phases(limit: float) -> list[str]:
        scores = {"words": {"function": f"{scoring}:words", "at_least": limit}}
        options = {"scores": scores, "near_distance": None}
        run.config = run.config.model_copy(
            update={"screen": screen.ScreenSettings.model_validate(options)}
        )
        inline.ran.clear()
        inline.advance(run, [screen.STAGE])
        return [task.params["phase"] for task in inline.ran]

    run = pool.run(PAIRS[:3], 1, ListsSettings(), {"near_distance": None})
    assert phases(2) == ["look", "decide"]
    assert phases(3) == ["decide"]
    with (tmp_path / "my_scores.py").open("a") as source:
        source.write("\n# another version\n")
    assert phases(3)[0] == "look"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "nothing_such:score",
            "no module 'nothing_such' in Python is there; install it, or run from",
        ),
        ("nothing.such:score", "No module named 'nothing'"),
        ("my_scores", "is not of the form package.module:function"),
        ("my_scores:missing", "but not 'missing'"),
        ("my_scores:two_for_one", r"scores\.mine: its function returned float32 \[2\] for 1 pictu"),
        (
            "my_scores:partly",
            r"scores\.mine: its function returned float32 \[1, 2\] for 1 pictures",
        ),
    ],
)
def test_functions_that_cannot_be_used_are_named(
    pool: Pool, scoring: str, function: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pool.screen(PAIRS[:1], files=1, scores={"mine": {"function": function}})


def test_no_function_can_change_what_the_next_one_sees(pool: Pool, scoring: str) -> None:
    with pytest.raises(ConfigError, match=r"scores\.mine.*read-only"):
        pool.screen(PAIRS[:1], 1, scores={"mine": {"function": f"{scoring}:blackened"}})


def test_a_function_may_be_defined_under_a_condition(pool: Pool, scoring: str) -> None:
    found = pool.screen(PAIRS[:1], 1, scores={"mine": {"function": f"{scoring}:conditional"}})
    assert found.histograms["score:mine"] == {"1": 1}


def test_blur_makes_pictures_less_sharp(photos: list[Any]) -> None:
    import cv2

    sharp = [smaller(photo, 200) for photo in photos[:20]]
    blurred = [cv2.GaussianBlur(photo, (9, 9), 3) for photo in sharp]
    values = measures.sharpness([*sharp, *blurred], [""] * 40)
    assert (values[20:] < values[:20] / 4).all()
    assert measures.entropy(sharp, [""] * 20).mean() > 6
    plain = np.full((20, 20, 3), 9, np.uint8)
    assert measures.entropy([plain], [""]).tolist() == [0]


def test_faces_are_found_where_there_is_one() -> None:
    """A drawn face: what the cascade looks for is the light and dark of eyes, nose and mouth."""
    import cv2

    face = np.full((240, 240, 3), 90, np.uint8)
    cv2.ellipse(face, (120, 120), (70, 92), 0, 0, 360, (205, 190, 180), -1)
    for x in (92, 148):
        cv2.ellipse(face, (x, 98), (19, 7), 0, 0, 360, (60, 50, 50), -1)
        cv2.ellipse(face, (x, 84), (21, 4), 0, 0, 360, (80, 60, 60), -1)
    cv2.ellipse(face, (120, 132), (9, 20), 0, 0, 360, (225, 210, 200), -1)
    cv2.ellipse(face, (120, 170), (27, 7), 0, 0, 360, (90, 50, 70), -1)
    face = cv2.GaussianBlur(face, (7, 7), 2)
    values = measures.faces([face, picture(3)], ["", ""])
    assert values[0] > 0.1
    assert values[1] == 0
