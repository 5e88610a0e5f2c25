"""Encoding images as files with their parameters inside, and uploading the files to the object store."""
