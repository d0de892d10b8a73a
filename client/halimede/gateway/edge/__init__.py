"""The edge: what holds for every request, whatever its dialect."""
