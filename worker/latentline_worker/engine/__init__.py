"""Continuous batching at the level of one denoise step."""
