"""Protections that others have published, to be judged beside this product's own on equal terms."""
