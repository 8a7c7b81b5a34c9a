"""Regimes that take deltas away, or learn around them."""
