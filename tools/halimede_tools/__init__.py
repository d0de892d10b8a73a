"""Tools that turn an embedding model into a Triton model repository, and serve it."""
