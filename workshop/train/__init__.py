"""Training of a Mixture-of-Experts model from texts."""
