"""Deploy: shadow, canary, promote, roll back."""
