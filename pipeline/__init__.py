"""What computes: no Ray, no flags, no printing."""
