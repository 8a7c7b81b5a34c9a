"""Options and steps of protect_baseline."""
