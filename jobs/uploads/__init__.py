"""Options and steps of protect_uploads."""
