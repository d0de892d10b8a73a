"""Configuration: a YAML file, the environment, one typed object."""
