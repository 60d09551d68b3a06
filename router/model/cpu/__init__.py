"""What takes the place of torch's operations on a processor."""
