"""Published protections that need a network trained on the pictures first."""
