"""Starts and watches Triton in NVIDIA's container."""
