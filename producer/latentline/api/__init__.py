"""The HTTP API: ``app`` assembles it from one router per dialect."""
