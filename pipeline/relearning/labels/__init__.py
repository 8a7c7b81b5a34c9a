"""The labels that an adversary trains on, and how much clusters reveal about them."""
