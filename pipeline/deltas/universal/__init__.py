"""The universal generator of One for All: its network, its file and its deltas."""
