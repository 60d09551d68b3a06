"""A gateway's own listeners: HTTP, gRPC, and gRPC for operators."""
