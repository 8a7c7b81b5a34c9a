"""What runs in Ray: holds models and data; the computation itself is in pipeline."""
