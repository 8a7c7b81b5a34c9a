"""Denoisers: networks that an adversary trains to remove deltas."""
