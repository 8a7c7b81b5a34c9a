"""Where objects lie: folders, buckets, and what goes wrong with them."""
