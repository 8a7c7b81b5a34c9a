"""The universal generator of One for All: its network, its file, and the deltas it gives to pictures."""
