"""Plans memory and devices for a model before anything starts."""
