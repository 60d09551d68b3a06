"""The experts' products."""
