"""Benchmarks: scripts that print a table and write a report."""
