"""Measurements of what a protection does to pictures, and estimates of what a run will take."""
