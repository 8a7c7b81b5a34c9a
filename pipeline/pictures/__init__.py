"""One picture: format, decoding and encoding, metadata, and finding it among a sample's members."""
