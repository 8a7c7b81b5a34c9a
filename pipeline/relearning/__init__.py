"""How much a collection still teaches: targets, regimes, and the training of one under the other."""
