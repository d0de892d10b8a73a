"""The catalogue of known models, and the store of downloads and built files."""
