"""Other programs that serve the same checkpoint, each in an environment of its own."""
