"""Shards of samples: listed, read, written."""
