"""The Open Inference Protocol: predictions of mixtures over HTTP and gRPC."""
