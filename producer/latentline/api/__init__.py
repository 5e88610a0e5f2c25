"""The HTTP API: ``app`` assembles it, one file per dialect."""
