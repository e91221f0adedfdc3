"""A data set on disk -> shards."""
