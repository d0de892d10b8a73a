"""Statistics, Prometheus metrics, OpenTelemetry spans, progress bars and the monitor."""
