"""What runs in Ray: holds models and data, computes nothing of its own."""
