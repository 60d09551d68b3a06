"""Metrics, traces and progress bars: the catalogue of metrics, the exposition, spans."""
