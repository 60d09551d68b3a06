"""Metrics and traces: the catalogue of metrics, a router's counters, the exposition, spans."""
