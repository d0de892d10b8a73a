"""Image encoders: how their folders are read, and which of their outputs is the vector."""
