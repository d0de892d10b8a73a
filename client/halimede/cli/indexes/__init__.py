"""Verbs of collections of vectors."""
