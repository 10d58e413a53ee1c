"""CLIP on the shards that `pack` made: two towers, one contrastive loss, zero-shot evaluation."""
