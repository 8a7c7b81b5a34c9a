"""The labels that an adversary trains on, and what clusters tell of them."""
