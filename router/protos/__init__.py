"""The public gRPC interface and its generated stubs (python -m router.protos.generate)."""
