"""From features to clusters."""
