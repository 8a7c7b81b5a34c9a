"""Shards of samples: listing, reading and writing."""
