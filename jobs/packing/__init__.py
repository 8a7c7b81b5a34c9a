"""Options and steps of pack and unpack."""
