"""Deltas made for each image from its own pixels: by sign steps, or by one pass of a network."""
