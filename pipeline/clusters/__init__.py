"""Clustering of features."""
