"""From token events to text."""
