"""The messages between gateway and router, and the link that carries tokens."""
