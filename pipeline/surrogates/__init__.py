"""Pretrained encoders and their features."""
