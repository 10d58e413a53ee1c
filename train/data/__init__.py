"""From shards to batches: which sample when, ranged reads, decoding, and one loader over them."""
