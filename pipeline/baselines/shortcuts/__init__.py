"""Published protections that need labels, but no network: patterns that are easier to learn than pictures."""
