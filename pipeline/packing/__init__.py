"""From published data sets to shards, and back: sources of many formats, one plan, one transaction per shard."""
