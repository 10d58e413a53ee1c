"""The parquet schemas that stages exchange, in one place.

Identifiers: `uid` is 16 bytes, xxh3-64 of the url, then xxh3-64 of url, a zero byte and the
normalised text, both big-endian; `query_id` is a row number of `queries.parquet`. In the order of
uids, which is a random order of addresses, the captions of an address lie side by side: a range of
uids is a range of addresses too, and from `match` on every stage cuts its work into such ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ConfigError

UID = pa.binary(16)

QUERIES = pa.schema(
    [
        ("query_id", pa.uint32()),
        ("text", pa.string()),
        ("norm", pa.string()),  # text.normalise(text): what is searched for
        ("sources", pa.list_(pa.string())),  # of: file, word, bigram, title, wordnet
        ("word_count", pa.uint64()),
        ("pmi", pa.float32()),  # bits; null unless a bigram
        ("pair_count", pa.uint64()),
        ("views", pa.uint64()),
        ("synsets", pa.uint16()),  # of WordNet, that have it as a lemma
        ("rank", pa.uint32()),  # order of admission
    ]
)

WORDNET = pa.schema(
    [
        ("synset", pa.string()),  # offset and part of speech, as 02084071-n
        ("lemmas", pa.list_(pa.string())),
        ("query_ids", pa.list_(pa.uint32())),  # the query that each lemma is; null: none
        ("hypernyms", pa.list_(pa.string())),  # synsets that it is a kind, or an instance, of
        ("depth", pa.uint8()),  # steps up to a synset without hypernyms, at least
    ]
)

CANDIDATES = pa.schema(
    [
        ("url", pa.string()),  # absolute, of the picture
        ("text", pa.string()),  # text.clean() of what the page said
        ("page_url", pa.string()),
        ("source", pa.string()),  # alt, title, figcaption, or the pool's name
        ("snapshot", pa.string()),  # which crawl or pool
        ("file", pa.string()),  # which file of it; (snapshot, file) orders occurrences
    ]
)

MATCHED = pa.schema(
    [
        ("uid", UID),
        *CANDIDATES,
        ("query_ids", pa.list_(pa.uint32())),  # sorted, unique
    ]
)

TEXTS = pa.schema([("uid", UID), *CANDIDATES])
"""What is read again only for pairs that are downloaded; one row a pair of a snapshot."""

FOUND = pa.schema(
    [
        ("uid", UID),
        ("domain", pa.dictionary(pa.int32(), pa.string())),  # registered, of the address
        ("query_ids", pa.list_(pa.uint32())),
        ("occurrences", pa.uint32()),  # in this snapshot
    ]
)
"""The same pairs without their texts: all that deciding about them takes."""

PAIRS = pa.schema(
    [
        *FOUND,  # occurrences: in all snapshots
        ("snapshot", pa.string()),  # the earliest with this pair: whose TEXTS row stands for it
    ]
)

SELECTED = pa.schema(
    [
        *(field for field in PAIRS if field.name != "domain"),
        ("selected_by", pa.list_(pa.uint32())),  # the queries that chose this pair
        ("probability", pa.float32()),  # of being selected, over the seeds
    ]
)

FETCHED = pa.schema(
    [
        ("uid", UID),
        *CANDIDATES,
        ("texts", pa.string()),  # identity of the TEXTS file that the above is from
        ("status", pa.string()),  # "ok", or the reason why there is no picture
        ("error", pa.string()),
        ("http_status", pa.uint16()),  # 0: no answer
        ("final_url", pa.string()),
        ("fetched", pa.timestamp("s", "UTC")),  # when it ended; never part of a shard
        ("bytes", pa.uint32()),  # that the server sent
        ("format", pa.string()),  # jpeg, png, webp, gif; "" where it is none
        ("sha256", pa.binary(32)),  # of the bytes that the server sent
        ("width", pa.uint16()),  # as stored, pixels
        ("height", pa.uint16()),
        ("original_width", pa.uint16()),
        ("original_height", pa.uint16()),
        ("blurred", pa.uint16()),  # boxes of it, by `download.blur`
        ("staged", pa.string()),  # tar below RUN/download/out that holds the picture
        ("staged_offset", pa.uint64()),  # of its bytes in the tar
        ("staged_bytes", pa.uint32()),
        ("staged_sha256", pa.binary(32)),  # of its bytes as stored
    ]
)

PDQ = pa.binary(32)


def looked(scores: Iterable[str]) -> pa.Schema:
    """What `screen` saw in the pictures of a file of FETCHED; a column for each of its scores."""
    return pa.schema(
        [
            ("uid", UID),
            ("pdq", PDQ),  # perceptual hash of the picture as stored
            ("pdq_weak", PDQ),  # its bits that are the first to flip, see `screen.near`
            ("pdq_quality", pa.uint8()),  # 0 to 100
            *((name, pa.float32()) for name in scores),
        ]
    )


EVALUATION = pa.schema(
    [
        ("set", pa.string()),
        ("sha256", pa.binary(32)),  # of the file
        ("pdq", PDQ),  # null where it cannot be decoded
        ("pdq_quality", pa.uint8()),
    ]
)

HITS = pa.schema(
    [
        ("row", pa.uint32()),  # among all pictures that were looked at, in the order of uids
        ("set", pa.string()),
        ("distance", pa.uint8()),  # bits of 256
    ]
)

SCREENED = pa.schema(
    [
        ("uid", UID),
        ("keep", pa.bool_()),
        ("reason", pa.string()),  # "" for those kept
        ("selected_by", pa.list_(pa.uint32())),  # the queries that keep it, after `balance.spare`
        ("captions", pa.list_(pa.string())),  # of its picture: its own, then others'; if kept
        ("duplicate_group", UID),  # the smallest uid among pairs with about the same picture
    ]
)

INDEX = pa.schema(
    [
        ("uid", UID),
        ("shard", pa.string()),  # file name below shards/
        ("offset", pa.uint64()),  # of the sample's first tar header in the shard, bytes
        ("length", pa.uint64()),  # of all its members with headers and padding, bytes
        ("image_offset", pa.uint64()),  # of the picture's bytes in the shard
        ("image_bytes", pa.uint32()),
        ("text_offset", pa.uint64()),
        ("text_bytes", pa.uint32()),
        ("json_offset", pa.uint64()),
        ("json_bytes", pa.uint32()),
        ("width", pa.uint16()),
        ("height", pa.uint16()),
        ("sha256", pa.binary(32)),  # of the picture as stored
        ("sent_sha256", pa.binary(32)),  # of the bytes that the server sent
        ("caption_hash", pa.uint64()),  # xxh3-64 of the text's bytes
        ("json_hash", pa.uint64()),  # xxh3-64 of the JSON's bytes
        ("duplicate_group", UID),  # see SCREENED
        ("query_ids", pa.list_(pa.uint32())),
        ("selected_by", pa.list_(pa.uint32())),
        ("probability", pa.float32()),
    ]
)


def sent_digest(path: Path) -> str:
    """The column of an `index.parquet` or `fetched-*.parquet` with the SHA-256 of what was sent."""
    names = pq.read_schema(path).names
    if "uid" in names and "sent_sha256" in names:
        return "sent_sha256"
    if "uid" in names and "sha256" in names and "staged_sha256" in names:
        return "sha256"
    raise ConfigError(
        f"download.expected: {path} does not say which files servers sent; give an index.parquet"
        " with a column sent_sha256, or fetched-*.parquet"
    )


_REPEATING = ("page_url", "source", "snapshot", "file", "domain")


def writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A parquet file of one of these schemas, encoded for what its columns hold.

    A dictionary pays only where values repeat, and a hash does not compress.
    """
    leaves = {
        field.name: f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
    }
    return pq.ParquetWriter(
        path,
        schema,
        compression={leaf: "none" if name == "uid" else "zstd" for name, leaf in leaves.items()},
        use_dictionary=[name for name in schema.names if name in _REPEATING],
    )
