"""Models by name: the catalogue, and the store of downloads and built files."""
