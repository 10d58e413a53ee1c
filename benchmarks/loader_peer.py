"""open_clip's training pipeline, in a process of its own: `python loader_peer.py SHARDS WORKERS …`.

The steps of open_clip's `get_wds_dataset`, in their order and with its buffer sizes, from
webdataset's public interface: its own module does not import with the webdataset that it needs and
today's other packages. Prints the seconds that the batches after the first ones took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

SHARD_BUFFER, SHARD_INITIAL = 2000, 500
SAMPLE_BUFFER, SAMPLE_INITIAL = 5000, 1000


def _complete(sample: dict[str, Any]) -> bool:
    return "txt" in sample and "jpg" in sample


def _loader(shards: list[str], workers: int, batch: int, side: int) -> Any:
    import open_clip
    import webdataset as wds
    from open_clip.transform import image_transform

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    preprocess: Callable[[Any], Any] = image_transform(side, is_train=True)
    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.detshuffle(SHARD_BUFFER, SHARD_INITIAL),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(SAMPLE_BUFFER, initial=SAMPLE_INITIAL),
        wds.select(_complete),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    return wds.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=True
    )


def main(arguments: list[str]) -> None:
    """Print the seconds that `count` batches took after `first` ones."""
    folder, *numbers = arguments
    workers, batch, side, first, count = map(int, numbers)
    shards = [f"{folder}/{number:05d}.tar" for number in range(20)]
    batches = iter(_loader(shards, workers, batch, side))
    for _ in range(first):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        image, tokens = next(batches)
        assert image.shape == (batch, 3, side, side)
        assert tokens.shape == (batch, 77)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1:])
