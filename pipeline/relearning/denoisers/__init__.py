"""Denoisers: networks that an adversary trains to take deltas off."""
