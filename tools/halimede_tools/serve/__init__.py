"""Start Triton, from the wheel or in a container, and keep it running."""
