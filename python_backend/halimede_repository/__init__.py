"""A model repository on disk, read without Triton or protobuf."""
