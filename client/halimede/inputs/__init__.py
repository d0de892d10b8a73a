"""Inputs: texts, images, archives and urls, as bytes to embed."""
