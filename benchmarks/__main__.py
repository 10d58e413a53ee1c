"""`python -m benchmarks NAME …`: one JSON line a result.

A benchmark is a module of this package with `measure() -> Iterator[dict]`; each dictionary carries
`name`, `ours`, `peer`, `ratio` (where it is a speed, above 1 ours is faster), `unit`, and the sizes
it was taken at.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks

_NOT_BENCHMARKS = {
    *("__main__", "timing"),
    *(
        "download_sides",
        "download_web",
        "extract_inputs",
        "extract_peers",
        "loader_inputs",
        "loader_peer",
        "match_inputs",
        "queries_inputs",
    ),
}


def names() -> list[str]:
    """The benchmarks there are."""
    modules = pkgutil.iter_modules([str(Path(benchmarks.__file__).parent)])
    return sorted(module.name for module in modules if module.name not in _NOT_BENCHMARKS)


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; 2 for a name that does not exist."""
    wrong = [name for name in arguments if name not in names()]
    if wrong:
        print(f"usage: python -m benchmarks NAME …, of: {', '.join(names())}", file=sys.stderr)
        for name in wrong:
            print(f"there is no benchmark {name!r}", file=sys.stderr)
        return 2
    for name in arguments or names():
        for result in importlib.import_module(f"benchmarks.{name}").measure():
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
