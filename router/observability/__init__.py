"""Metrics: what there is (``catalogue``), how a router counts, how all of it is written out."""
