"""Fitting deltas and proxies to a collection."""
