"""What gateway and router say to each other."""
