"""Dataset folder -> shards -> batches. Imports nothing of `learning` or `run`."""
