"""Regimes that remove deltas or learn around them."""
