"""Whether a file is whole, as its format tells."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import files, tar


def rows(path: Path) -> int | None:
    """Rows of a parquet file or members of a tar; None of another format.

    All of it is read; raises whatever its reader raises if something is missing or wrong.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".tar":
        return tar_members(path)
    if path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".npy":
        _check_npy(path)
    return None


def _parquet_rows(path: Path) -> int:
    with files.open_parquet(path) as parquet:
        read: int = sum(batch.num_rows for batch in parquet.iter_batches(batch_size=4096))
        if read != parquet.metadata.num_rows:
            raise ValueError(f"{read} rows read, {parquet.metadata.num_rows} declared")
        return read


def _check_npy(path: Path) -> None:
    import numpy as np

    np.load(path, mmap_mode="r", allow_pickle=False)


def tar_members(path: Path) -> int:
    """Members of a tar, every byte of it accounted for; raises `BrokenTar`."""
    with tar.opened(path) as whole:
        return sum(1 for _ in tar.members(whole))
