"""Model families: what the engine needs of one (``base``), one self-contained file per family, a registry."""
