"""Access to objects in folders and buckets, and how it can fail."""
