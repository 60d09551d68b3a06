"""Deployment files (Serve configurations and the bundled model) as package data."""
