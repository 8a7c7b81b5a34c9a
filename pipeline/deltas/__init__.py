"""Deltas: how they are made, added to pictures, and stored in the protection file."""
