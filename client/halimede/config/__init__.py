"""The configuration: argument > environment > file > default, resolved into one typed object."""
