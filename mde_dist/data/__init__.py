"""Shards -> batches: depth units, shard format, sampler, loader, augmentation, storage on servers."""
