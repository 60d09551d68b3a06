"""The OpenAPI document of the gateway's HTTP port: what its routes take, and what they answer."""
