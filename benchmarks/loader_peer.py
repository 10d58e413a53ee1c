"""open_clip's training pipeline, in a process of its own that `benchmarks.loader` starts.

The steps of open_clip's `get_wds_dataset`, in their order and with its buffer sizes, from
webdataset's public interface: its own module does not import with the webdataset that it needs and
today's other packages.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import cpu_seconds

_SHARD_BUFFER, _SHARD_INITIAL = 2000, 500
_SAMPLE_BUFFER, _SAMPLE_INITIAL = 5000, 1000


def _complete(sample: dict[str, Any]) -> bool:
    return "txt" in sample and "jpg" in sample


def _loader(shards: list[str], workers: int, batch: int, side: int) -> Any:
    import open_clip
    import webdataset as wds
    from open_clip.transform import image_transform

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.detshuffle(_SHARD_BUFFER, _SHARD_INITIAL),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(_SAMPLE_BUFFER, initial=_SAMPLE_INITIAL),
        wds.select(_complete),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(
            image=image_transform(side, is_train=True), text=lambda text: tokenizer(text)[0]
        ),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    return wds.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=True
    )


def main(arguments: list[str]) -> None:
    """Print the seconds, by the wall clock and of processor time, that the timed batches took."""
    folder, *numbers = arguments
    workers, batch, side, context, first, count = map(int, numbers)
    shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    batches = iter(_loader(shards, workers, batch, side))
    for _ in range(first):
        next(batches)
    began, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        image, tokens = next(batches)
        assert image.shape == (batch, 3, side, side)
        assert tokens.shape == (batch, context)
    print(time.perf_counter() - began, cpu_seconds() - cpu)


if __name__ == "__main__":
    main(sys.argv[1:])
