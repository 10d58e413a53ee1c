"""In which language captions are, as a function of the user's choice says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from dataset_build import functions
from pipeline.config import ConfigError

SETTING = "extract.language"
CODE = r"^([a-z]{2,3}([-_]\w+)*)?$"
"""What a code looks like (BCP 47); empty, a language that cannot be told."""

Detect = Callable[[Sequence[str]], Any]
"""A list of texts, each another -> a list with the code of each."""


def of(texts: Sequence[str], detect: Detect) -> list[str]:
    """The code of each text, which may be there several times.

    Raises `ConfigError` if `detect` fails, or returns anything but a code for each.
    """
    different = list(dict.fromkeys(texts))
    with functions.called(SETTING):
        codes = list(detect(different))
    if len(codes) != len(different):
        raise ConfigError(
            f"{SETTING}: its function returned {len(codes)} codes for {len(different)} texts;"
            " one for each is wanted"
        )
    for code in codes:
        if not (isinstance(code, str) and re.fullmatch(CODE, code)):
            raise ConfigError(
                f"{SETTING}: its function returned {code!r:.100}, no code of a language;"
                ' "en" is one, "" where it cannot tell'
            )
    found = dict(zip(different, codes, strict=True))
    return [found[text] for text in texts]
