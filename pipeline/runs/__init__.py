"""The records of a run: what it was asked, what it has committed, whether it may start."""
