"""One download by one side, in a process of its own that `benchmarks.download` starts.

The peer's names resolve to the server by a patch of `getaddrinfo`, which costs it less than a
resolver would; ours by the detour that a made-up web is reached by. Neither asks a resolver.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any

IMAGE_SIZE, RESIZE_MODE, QUALITY = 256, "keep_ratio", 95
TIMEOUT_S, RETRIES, MIN_SIDE, MAX_PIXELS, MAX_ASPECT_RATIO = 30, 1, 16, 25_000_000, 20.0


def config(folder: Path, threads: int) -> dict[str, Any]:
    """The build of which our side does the download."""
    return {
        "queries": {"file": [str(folder / "queries.txt")]},
        "extract": {"pool": [str(folder / "pool.parquet")], "min_words": 1},
        "download": {
            "pairs_per_task": 1 << 20,  # all in one task, as all are in one shard of the peer
            "threads": threads,
            "polite_connections": threads,  # manners are not what is measured
            "requests_per_s": None,
            "robots": "ignore",  # the peer asks for none
            "contact": "bench@machine.example",
            "allow_networks": ["127.0.0.0/8"],
            "image_size": IMAGE_SIZE,
            "resize_mode": RESIZE_MODE,
            "encode_quality": QUALITY,
            "timeout_s": TIMEOUT_S,
            "retries": RETRIES,
            "min_side": MIN_SIDE,
            "max_pixels": MAX_PIXELS,
            "max_aspect_ratio": MAX_ASPECT_RATIO,
        },
    }


def ours(folder: Path, threads: int) -> None:
    """The download task of the run `folder/run`, as a task's process does it, and published."""
    from dataset_build import download
    from pipeline import recipe, runner
    from pipeline.stage import Run
    from pipeline.stop import StopFlag

    run = Run(folder / "run", recipe.Config.model_validate(config(folder, threads)))
    shutil.rmtree(run.stage_folder("download"), ignore_errors=True)
    (planned,) = download.STAGE.planned(run, 0, 0)
    runner.work_on(run, download.STAGE, planned, 1, StopFlag())


def peer(folder: Path, threads: int) -> None:
    """img2dataset's own entry point: one process, one shard."""
    from img2dataset.main import download

    shutil.rmtree(folder / "peer", ignore_errors=True)
    download(
        url_list=str(folder / "pool.parquet"),
        input_format="parquet",
        url_col="url",
        caption_col="text",
        output_folder=str(folder / "peer"),
        output_format="webdataset",
        processes_count=1,
        thread_count=threads,
        number_sample_per_shard=1 << 20,
        image_size=IMAGE_SIZE,
        resize_mode=RESIZE_MODE,
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        timeout=TIMEOUT_S,
        retries=RETRIES,
        min_image_size=MIN_SIDE,
        max_image_area=MAX_PIXELS,
        max_aspect_ratio=MAX_ASPECT_RATIO,
        extract_exif=False,  # ours never keeps it
        compute_hash="sha256",
        max_shard_retry=0,
    )


def pictures(folder: Path, side: str) -> int:
    """How many pictures the last download of a side left in its tars."""
    tars = (folder / ("peer" if side == "peer" else "run/download/store")).rglob("*.tar")
    count = 0
    for path in tars:
        with tarfile.open(path) as tar:
            count += sum(member.name.endswith(".jpg") for member in tar)
    return count


def _resolve_here(port: int, domain: str) -> None:
    """Every host below `domain` is this machine's `port`, in this process and its children."""
    resolve = socket.getaddrinfo

    def answer(host: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(host, str) and host.endswith(domain):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        return resolve(host, *arguments, **options)

    socket.getaddrinfo = answer


if port := os.environ.get("OPENWIT_BENCHMARK_PORT"):
    _resolve_here(int(port), ".example")

if __name__ == "__main__":
    {"ours": ours, "peer": peer}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
