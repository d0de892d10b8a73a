"""Files and batches: jobs of many requests, on disk."""
