"""The models that the gateway answers for."""
