"""Token ids: those of open_clip's tokenizer, whatever the text."""

# ruff: noqa: RUF001  (characters that look alike are the point)

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import tokenizer
from train.data.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent.parent

HARD = [
    "",
    " ",
    "It's they're I'VE we'll he'd 'S'T ''s",
    "a <start_of_text> b <end_of_text>c <END_OF_TEXT> start_of_text",
    "&lt;b&gt; &amp;amp; &amp;lt; &#x1F600; &nbsp; &eacute;&copy &notanentity;",
    "“curly” ‘quotes’ — dashes… ﬁne ＦＵＬＬ　ｗｉｄｔｈ",
    "schÃ¶n, donâ€™t — mojibake",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ emoji",
    "日本語 한국어 ไทย العربية עברית Ελληνικά Кириллица",
    "e\u0301 İstanbul ſtraße ẞ K 'ſ",
    "tabs\tand\nlines\r\n\x0b\x0c\x1c\x85\u2028ends\x00\x07\x1b[1mbold\x1b[0m\ufeff\u200b",
    "²³ ½ Ⅷ ①②③ 12,345.67 0x1F 3rd 1990s",
    "C++ ... !!! $$$ #hashtag @name a_b a-b a/b http://x.y/z?q=1&r=2",
    "\ud800 lone surrogate".encode("utf-8", "replace").decode(),
    "supercalifragilisticexpialidocious " * 40,
    "x" * 300,
]


@pytest.fixture(scope="module")
def peer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _equal(ours: Tokenizer, peer: Any, text: str) -> None:
    expected = peer(text, context_length=ours.context_length)[0].tolist()
    assert ours(text).tolist() == expected, text


@pytest.mark.parametrize("context", [4, 24, 77])
def test_hard_texts(peer: Any, context: int) -> None:
    ours = Tokenizer(context)
    for text in HARD:
        _equal(ours, peer, text)
        _equal(ours, peer, text.upper())
    _equal(ours, peer, " ".join(HARD))


_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
_NEAR = st.text(st.sampled_from("aAsStT'dDrRe 0&;#xlgtm<>_é’ﬁſ\t\n\x1b[m🐶"), max_size=60)


@given(text=_ANY | _NEAR)
def test_any_text(peer: Any, text: str) -> None:
    _equal(Tokenizer(32), peer, text)


def test_symbols_of_the_vocabulary(peer: Any) -> None:
    """Every seventh of all there are, as a word of its own."""
    ours = Tokenizer(77)
    words = [peer.decode([symbol]) for symbol in range(0, 49_406, 7)]
    for start in range(0, len(words), 8):
        _equal(ours, peer, " ".join(words[start : start + 8]))


@pytest.mark.skipif("OPENWIT_DATA" not in os.environ, reason="OPENWIT_DATA is not set")
def test_real_captions(peer: Any) -> None:
    path = Path(os.environ["OPENWIT_DATA"]) / "captions" / "flickr8k.token.txt.gz"
    captions = gzip.decompress(path.read_bytes()).decode().splitlines()
    ours = Tokenizer(77)
    for caption in captions[::9]:
        _equal(ours, peer, caption.partition("\t")[2])


def test_forgetting_words_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a {word} of words" for word in ("zebra", "lighthouse", "<start_of_text>", "été")]
    expected = [Tokenizer(16)(text).tolist() for text in texts]
    monkeypatch.setattr(tokenizer, "_MAX_WORDS", 4)
    small = Tokenizer(16)
    for _ in range(3):
        assert [small(text).tolist() for text in texts] == expected
        assert len(small._words) <= 4


def test_a_copy_encodes_alike() -> None:
    ours = Tokenizer(12)
    copy = pickle.loads(pickle.dumps(ours))
    assert copy("a zebra").tolist() == ours("a zebra").tolist()
    assert len(pickle.dumps(ours)) < 200


def test_workers_load_no_torch() -> None:
    code = (
        "import sys, train.data.workers; from train.data.tokenizer import Tokenizer; Tokenizer(8);"
        "print([m for m in ('torch', 'open_clip', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
