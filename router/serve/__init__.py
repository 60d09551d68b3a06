"""The Serve deployments."""
