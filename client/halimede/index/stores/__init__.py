"""Stores of vectors, one a file."""
