"""Statistics, Prometheus metrics, OpenTelemetry spans, the monitor."""
