"""One HTTP endpoint that speaks the dialects of other embedding servers and APIs."""
