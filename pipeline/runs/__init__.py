"""The records of a run: its settings, its commits, and whether it may start."""
