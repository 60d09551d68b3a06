"""A client's request: its fields, described once for HTTP, gRPC and the OpenAPI document."""
