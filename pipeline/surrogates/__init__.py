"""Pretrained encoders, and the features they give."""
