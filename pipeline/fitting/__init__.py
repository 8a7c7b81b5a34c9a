"""How deltas and proxies are fitted to a collection."""
