"""Start and watch Triton in NVIDIA's container."""
