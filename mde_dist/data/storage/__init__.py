"""Files of shards: on this machine, or on a server with a cache on this machine."""
