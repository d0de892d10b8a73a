"""Datasets through an embedder: here, and on a Ray cluster."""
