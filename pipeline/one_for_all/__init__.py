"""One for All (14A, Chen et al. 2024): one generator, trained once, that gives every image a delta in one pass."""
