"""Pixels to files with their parameters inside, and files into the object store."""
