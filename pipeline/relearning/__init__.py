"""How much a model can still learn from a collection: targets, regimes, and training a target under a regime."""
