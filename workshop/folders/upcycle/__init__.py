"""From a dense model to one with experts."""
