"""Measurements, run side by side in one process and told as ratios."""
