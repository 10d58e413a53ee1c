"""Names of WordNet's synsets, from Princeton's database files (`data.noun`, `data.verb`, …).

Format: wndb(5WN), https://wordnet.princeton.edu/documentation/wndb5wn
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import UserError

# synset_offset lex_filenum ss_type w_cnt word lex_id …: the first word names the synset. Where an
# adjective may stand in a sentence is marked behind it: (a) before a noun, (p) after, (ip) both.
_SYNSET = re.compile(r"\d{8} \d\d [nvasr] [0-9a-f]{2} ([^ (]+)(?:\((?:a|p|ip)\))? [0-9a-f] ")


def synset_names(path: Path) -> Iterator[str]:
    """The first lemma of every synset in one data file, in its order, with spaces in place of "_".

    Raises `UserError` naming the line of anything else than a synset.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.startswith("  "):  # the licence
                continue
            match = _SYNSET.match(line)
            if match is None:
                raise UserError(
                    f"{path}:{number}: not a WordNet synset; queries.wordnet takes the database's "
                    "data files (data.noun, data.verb, data.adj, data.adv)"
                )
            yield match[1].replace("_", " ")
