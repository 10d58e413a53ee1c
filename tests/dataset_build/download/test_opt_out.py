from __future__ import annotations

import pytest

from dataset_build.download.opt_out import opts_out, product_token

REFUSED = [
    ("x-robots-tag", "noai"),
    ("x-robots-tag", "NoAI"),
    ("x-robots-tag", "noimageai"),
    ("x-robots-tag", "noml"),
    ("x-robots-tag", "none"),
    ("x-robots-tag", "noindex"),
    ("x-robots-tag", "noimageindex"),
    ("x-robots-tag", "nofollow, noai"),
    ("x-robots-tag", " noarchive ,  noimageai "),
    ("x-robots-tag", "openwit: noai"),
    ("x-robots-tag", "OpenWIT: noindex"),
    ("x-robots-tag", "openwit: nofollow, noai"),
    ("x-robots-tag", "*: noai"),
    ("x-robots-tag", "googlebot: nofollow, openwit: noai"),
    ("x-robots-tag", "openwit: none, googlebot: all"),
    ("x-robots-tag", "unavailable_after: 25 Jun 2010 15:00:00 PST, noai"),
    ("x-robots-tag", "unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai"),
    ("x-robots-tag", "max-snippet: 20, noai"),
    ("x-robots-tag", "max-image-preview: large, noimageai"),
    ("x-robots-tag", "noai, max-video-preview: -1"),
    ("x-robots-tag", "unavailable_after: 25 Jun 2010 15:00:00 PST"),
    ("x-robots-tag", "unavailable_after: Friday, 25-Jun-10 15:00:00 PST"),
    ("x-robots-tag", "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT"),
    ("x-robots-tag", "Unavailable_After: 2010-06-25T15:00:00Z"),
    ("x-robots-tag", "unavailable_after: 2010-06-25"),
    ("x-robots-tag", "unavailable_after: 25-Jun-2010"),
    ("x-robots-tag", "nofollow, unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noarchive"),
    ("x-robots-tag", "openwit: unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT"),
    ("x-robots-tag", "unavailable_after: soon"),
    ("x-robots-tag", "unavailable_after:"),
    ("x-robots-tag", "unavailable_after: Friday"),
    ("x-robots-tag", "unavailable_after: Fri, 25 Jun 2055 15:00:00 GMT, noai"),
    ("x-robots-tag", "unavailable_after: 2055-06-25, openwit: noai"),
    ("tdm-reservation", "1"),
    ("tdm-reservation", " 1 "),
    ("tdm-reservation", "0, 1"),
    ("content-usage", "train-ai=n"),
    ("content-usage", "search=y, train-ai=n"),
    ("content-usage", "Train-AI = n;exp"),
]
ALLOWED = [
    ("x-robots-tag", ""),
    ("x-robots-tag", "all"),
    ("x-robots-tag", "nofollow"),
    ("x-robots-tag", "noarchive, nosnippet"),
    ("x-robots-tag", "googlebot: noindex"),
    ("x-robots-tag", "otherbot: noindex, nofollow"),
    ("x-robots-tag", "img2dataset: noai"),
    ("x-robots-tag", "openwit: all, googlebot: noai"),
    ("x-robots-tag", "unavailable_after: 25 Jun 2055 15:00:00 PST"),
    ("x-robots-tag", "unavailable_after: Friday, 25-Jun-55 15:00:00 PST"),
    ("x-robots-tag", "unavailable_after: Fri, 25 Jun 2055 15:00:00 GMT, nofollow"),
    ("x-robots-tag", "unavailable_after: 2055-06-25T15:00:00+02:00"),
    ("x-robots-tag", "googlebot: unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT"),
    ("x-robots-tag", "googlebot: nofollow, noai"),
    ("x-robots-tag", "open: noai"),
    ("x-robots-tag", "max-image-preview: none-of-these"),
    ("x-robots-tag", "noairplanes"),
    ("tdm-reservation", "0"),
    ("tdm-reservation", ""),
    ("content-usage", "train-ai=y"),
    ("content-usage", "search=n"),
    ("content-type", "noai"),
    ("x-other", "noindex"),
]


@pytest.mark.parametrize("header", REFUSED)
def test_refused(header: tuple[str, str]) -> None:
    assert opts_out([("content-type", "image/png"), header], "openwit")


@pytest.mark.parametrize("header", ALLOWED)
def test_allowed(header: tuple[str, str]) -> None:
    assert not opts_out([header], "openwit")


def test_any_of_several_headers_refuses() -> None:
    assert opts_out([("x-robots-tag", "all"), ("x-robots-tag", "noai")], "openwit")
    own = [("x-robots-tag", "googlebot: noai"), ("x-robots-tag", "openwit: noindex")]
    assert opts_out(own, "openwit")
    assert not opts_out(own[:1], "openwit")
    assert not opts_out([], "openwit")


def test_the_token_is_the_first_word_of_the_user_agent() -> None:
    assert product_token("OpenWIT/0.1 (+https://example.org)") == "openwit"
