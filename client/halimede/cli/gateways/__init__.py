"""`halimede gateway` and `halimede gateway-key`."""
