"""From a call to its result: cache, windows, providers, fallback."""
