"""What keeps Ray's cluster in hand: connecting, placing, streaming, failing, counting."""
