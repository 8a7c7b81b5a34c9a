"""One for All (14A, Chen et al. 2024): one generator, trained once, that makes a delta for any image in one pass."""
