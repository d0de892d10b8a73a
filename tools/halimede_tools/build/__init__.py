"""Build: from a model's name or folder to its folders in a model repository."""
