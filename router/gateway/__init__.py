"""Gateway: everything between a client and the stream of tokens from a router."""
