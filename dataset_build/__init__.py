"""The dataset: stages from query list to WebDataset shards, in the order the README names them."""
