"""Regimes that change what the target sees."""
