"""What every backend needs of Triton: requests, answers, errors, metrics."""
