"""One picture: its format, its decoding and encoding, and which member of a sample it is."""
