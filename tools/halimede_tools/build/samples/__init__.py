"""Texts, pictures and scored pairs that the build calibrates and checks with."""
