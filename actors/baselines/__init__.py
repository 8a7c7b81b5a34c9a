"""What runs in Ray for published protections alone: labels, and deltas of a whole collection."""
